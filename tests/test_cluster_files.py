"""The files under docs/cluster: what can be known of them without a cluster."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import typer
import yaml

from ddk_pipe.stages.cli import app

FOLDER = Path(__file__).parents[1] / "docs" / "cluster"
SLURM = FOLDER / "cache-teacher.sbatch"


def assert_a_command_of_ours(words: list[str]) -> None:
    """Fails unless the command line takes all of these options."""
    program: Any = typer.main.get_command(app)
    command = program.commands[words[1]]
    assert words[0] == "ddk-pipe"
    with click.Context(command) as context:
        known = {option for each in command.get_params(context) for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_slurm_file_is_a_shell_script_that_runs_our_command() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    (line,) = (line for line in SLURM.read_text().splitlines() if line.startswith("RAY_ADDRESS="))
    words = shlex.split(line.removesuffix("&"))
    assert_a_command_of_ours(words[1:])


def test_the_kuberay_file_names_our_command_and_this_ray() -> None:
    job = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert_a_command_of_ours(shlex.split(job["spec"]["entrypoint"]))
    pins = (FOLDER.parents[1] / "requirements" / "constraints.txt").read_text().splitlines()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in pins
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1

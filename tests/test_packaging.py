"""What an installation holds: every file of the package that git knows or would add, the links followed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["pipeline", "stages", "triton_kernels", "manifests"]


def listed() -> set[str]:
    """The package's files by git, as an installation names them: `ddk_pipe/stages/...`."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS, "src/ddk_pipe"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]  # without the links
    return {name.removeprefix("src/") if name.startswith("src/") else f"ddk_pipe/{name}" for name in files}


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    """A new folder or kind of file may need a line under tool.setuptools in pyproject.toml."""
    built = tmp_path / "built"
    build = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    code = "import setuptools; setuptools.setup()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "-q", *build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert files == listed()

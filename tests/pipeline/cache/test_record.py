from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from caches import FIRST, SECOND, read_all, reseal, verify_all

from ddk_pipe.pipeline.cache import CacheReader, read_spec
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def test_a_record_that_names_the_group_of_another_shard(folder: LocalFolder) -> None:
    path = folder.path / FIRST.record
    record = read_record(folder, SECOND, read_spec(folder))
    assert record is not None
    path.write_bytes(record.model_copy(update=vars(FIRST)).sealed())
    with pytest.raises(DdkError, match="names the group of another shard"):
        read_all(folder)
    shutil.copy(folder.path / SECOND.record, path)
    with pytest.raises(DdkError, match="commit record of another shard"):
        read_all(folder)


@pytest.mark.parametrize("edit", ["positions", "seal", "cut", "files"])
def test_edited_commit_records(folder: LocalFolder, edit: str) -> None:
    path = folder.path / FIRST.record
    record = json.loads(path.read_text())
    if edit == "cut":
        path.write_text(path.read_text()[:-20])
    else:
        record[edit] = {"../../../../etc/passwd": {"bytes": 1, "blake2b": "0"}} if edit == "files" else 1
        path.write_text(json.dumps(record))
    with pytest.raises(DdkError, match=r"00000\.json: damaged commit record.*verify"):
        read_all(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": {"../../../secret": {"bytes": 1, "blake2b": "0"}}}, "leads outside"),
        ({"files": {"/etc/passwd": {"bytes": 1, "blake2b": "0"}}}, "leads outside"),
        ({"files": {}}, "lacks 'zarr.json'"),
        ({"checks": {}}, "lacks 'tokens'"),
        ({"group": "../../../../tmp"}, "names the group of another shard"),
        ({"group": "00001.01234567.zarr"}, "names the group of another shard"),
        ({"group": "00000.01234567.zarr"}, "committed but missing"),
        ({"positions": "12"}, "damaged commit record"),
        ({"positions": -1}, "damaged commit record"),
        ({"entries": 10**15}, "impossible numbers"),
        ({"windows": 2}, "another shard"),
        ({"label_nats": None}, "damaged commit record"),
    ],
)
def test_a_sealed_record_of_a_stranger(folder: LocalFolder, changes: dict[str, Any], expected: str) -> None:
    reseal(folder, **changes)
    with pytest.raises(DdkError, match=expected):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)
    with pytest.raises(DdkError):
        verify_all(folder)


def test_checks_of_another_length(folder: LocalFolder) -> None:
    record = json.loads((folder.path / FIRST.record).read_text())
    reseal(folder, checks={**record["checks"], "tokens": "00"})
    with pytest.raises(DdkError, match="checksum for every window"):
        read_all(folder)

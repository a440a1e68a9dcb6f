from __future__ import annotations

import json
from typing import Any

import pytest
from caches import make_plan, make_spec, resealed

from ddk_pipe.pipeline.cache import CacheReader
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema_version", 1, "schema version 1, this program reads 2, 3 and 4"),
        ("vocab_size", 91, "damaged or edited"),
        ("seq_len", 3, "damaged or edited"),
        ("seq_len", "12", "damaged or edited"),
        ("domains", {"../x": {}}, "damaged or edited"),
        ("domains", {"code": {"test": {}}}, "damaged or edited"),
        (
            "domains",
            {"code": {"train": {"windows": 2**50, "shard_windows": 1, "tokens_digest": ""}}},
            "damaged",
        ),
        ("teacher", "gone", "damaged or edited"),
        ("plan", {"scheme": "pps", "tau": "0.02"}, "damaged or edited"),
        ("fingerprint", "other", "damaged or edited"),
        ("attention", "document", "damaged or edited"),
        ("attention", "window", "damaged or edited"),
        ("schema_version", 4, "damaged or edited"),
    ],
)
def test_edited_cache_json(folder: LocalFolder, field: str, value: Any, expected: str) -> None:
    path = folder.path / "cache.json"
    values = {**json.loads(path.read_text()), field: value}
    for content in (resealed(values), json.dumps(values).encode()):
        path.write_bytes(content)
        with pytest.raises(DdkError, match=expected):
            CacheReader(folder, 1.0)


def test_a_size_in_cache_json_that_was_changed_without_its_seal(folder: LocalFolder) -> None:
    """The fingerprint does not cover sizes; two windows fewer would be silence."""
    path = folder.path / "cache.json"
    path.write_text(path.read_text().replace('"windows": 10', '"windows": 8', 1))
    with pytest.raises(DdkError, match="damaged or edited"):
        CacheReader(folder, 1.0)


def test_attention_and_schema_version_go_together_and_whole_windows_are_what_they_were() -> None:
    """A reader of version 3 would take documents for whole windows; caches of windows keep their fingerprint."""
    for wrong in ({"attention": "document"}, {"schema_version": 4}):
        with pytest.raises(ValueError, match="of attention"):
            make_spec(make_plan(), **wrong)
    windows = make_spec(make_plan())
    islands = make_spec(make_plan(), attention="document", schema_version=4)
    assert "attention" not in windows.identity() and b"attention" not in windows.to_json()
    assert islands.fingerprint != windows.fingerprint
    assert json.loads(islands.to_json())["attention"] == "document"

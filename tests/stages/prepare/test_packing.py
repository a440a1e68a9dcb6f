"""Training text is never validation text, long documents are documents, and what is left out is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import SENTENCES, MakeProject, write_jsonl

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.prepare import prepare


def rows(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{SENTENCES[i % 5]} {word} {i}"} for i in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"how deep at {i}?"},
                {"role": "assistant", "content": f"{i} m"},
            ]
        }
        for i in range(count)
    ]


def packed(path: Path, **domain: Any) -> dict[str, Any]:
    """Facts of both splits of a domain with these sources."""
    project = load_project(path, [f"domains={json.dumps({'sea': domain})}"])
    return {name: split.facts for name, split in prepare(project)["sea"].items()}


@pytest.mark.parametrize("records", [rows(30, "held"), chats(30)], ids=["text", "chats"])
@pytest.mark.parametrize(
    "way", ["glob", "folder", "copy", "compressed", "other order and fields", "split in two"]
)
def test_validation_text_is_left_out_of_training(
    make_project: MakeProject,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: list[dict[str, Any]],
    way: str,
) -> None:
    text = tmp_path / "sea"
    held = write_jsonl(text / "held.jsonl", records)
    write_jsonl(text / "more.jsonl", rows(40, "more"))
    other = tmp_path / "copy.jsonl"
    other.write_bytes(held.read_bytes())
    validation: Any = "copy.jsonl"
    if way == "compressed":
        (tmp_path / "copy.jsonl.gz").write_bytes(gzip.compress(held.read_bytes()))
        validation = "copy.jsonl.gz"
    elif way == "other order and fields":
        write_jsonl(other, [{"id": 7, **record} for record in records[::-1]])
    elif way == "split in two":
        write_jsonl(other, records[:11])
        write_jsonl(tmp_path / "rest.jsonl", records[11:])
        validation = ["copy.jsonl", "rest.jsonl"]
    train: Any = {"glob": "sea/*.jsonl", "folder": "sea"}.get(way, ["sea/held.jsonl", "sea/more.jsonl"])
    if way in ("glob", "folder"):
        validation = "sea/held.jsonl"
    facts = packed(make_project(), train=train, validation=validation)
    assert (facts["train"].documents, facts["train"].left_out, facts["validation"].documents) == (40, 30, 30)
    said = " ".join(capsys.readouterr().err.split())
    assert "30 documents of the training text are validation text too" in said and "held.jsonl:1" in said


def test_nothing_is_left_to_train_on(make_project: MakeProject, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(20, "same"))
    with pytest.raises(
        DdkError, match=r"all of its training text is validation text too \(first .*a.jsonl:1\)"
    ):
        packed(make_project(), train="a.jsonl", validation="b.jsonl")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_validation_reaches_over_all_of_its_files(make_project: MakeProject, tmp_path: Path) -> None:
    """It held the first files' text alone; all of it is kept out of training, shown in a window or not."""
    for number in range(6):
        write_jsonl(tmp_path / "v" / f"{number}.jsonl", rows(50, f"file{number}"))
    write_jsonl(tmp_path / "t.jsonl", rows(50, "own") + rows(50, "file5"))
    path = make_project(prepare={"max_validation_windows": 12})
    project = load_project(path, ['domains={"sea": {"train": "t.jsonl", "validation": "v"}}'])
    splits = prepare(project)["sea"]
    assert splits["validation"].facts.windows == 12
    assert splits["train"].facts.left_out == 50
    from transformers import AutoTokenizer

    tokens = splits["validation"].window(slice(None))[0]
    shown = AutoTokenizer.from_pretrained(project.tokenizer).decode(tokens.ravel().tolist())
    assert sum(f"file{number}" in shown for number in range(6)) >= 5


def test_what_validation_has_no_room_for_is_training_text(make_project: MakeProject, tmp_path: Path) -> None:
    """A twentieth of a large domain was in neither split."""
    write_jsonl(tmp_path / "t.jsonl", rows(600, "word"))
    path = make_project(prepare={"max_validation_windows": 2, "validation_fraction": 0.3})
    facts = packed(path, train="t.jsonl")
    assert facts["validation"].windows == 2
    assert facts["train"].documents + facts["validation"].documents == 600
    assert facts["validation"].documents < 20


def test_a_document_longer_than_a_shard(make_project: MakeProject, tmp_path: Path) -> None:
    """It ended the domain, from a time when a document had to lie in one shard."""
    write_jsonl(
        tmp_path / "t.jsonl", [{"text": "short"}] * 3 + [{"text": "word and word " * 2000}, *rows(9, "x")]
    )
    facts = packed(make_project(), train="t.jsonl")
    assert sum(facts[split].documents for split in facts) in (11, 13)  # three are equal: on one side
    assert facts["train"].windows * 32 > 10_000 or facts["validation"].unused_tokens > 1000


def test_one_document_cannot_be_both(make_project: MakeProject, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"text": "the only one"}] * 3)
    with pytest.raises(DdkError, match="one document cannot be both training and validation text"):
        packed(make_project(), train="t.jsonl")

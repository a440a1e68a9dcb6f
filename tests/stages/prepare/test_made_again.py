"""When `prepare` makes tokens again: whatever turned the text into them changed, and only then."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer, write_jsonl, write_project

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.text import tokenizer_digest
from ddk_pipe.stages.distill.students import shared_tokenizer
from ddk_pipe.stages.prepare import prepare

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"how deep at {i}?"},
            {"role": "assistant", "content": f"{i} m"},
        ]
    }
    for i in range(60)
]
OTHER = (
    "{% for m in messages %}<turn>the {{ m.role }} {{ strftime_now('%Y') }}\n{{ m.content }}<eos>{% endfor %}"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A project of a domain of text (code) and one of chats (plays), with a tokenizer of its own."""
    make_tokenizer(tmp_path / "teacher")
    path = write_project(tmp_path, tmp_path / "teacher")
    write_jsonl(tmp_path / "text" / "plays.jsonl", CHATS)
    return path


def tokens(project: Project) -> dict[str, bytes]:
    return {name: splits["train"].tokens[:].tobytes() for name, splits in prepare(project).items()}


def said(path: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, Any]:
    """What a second `prepare` says of each domain."""
    capsys.readouterr()
    prepare(load_project(path, list(settings)))
    lines = capsys.readouterr()
    first = [line for line in (lines.out + lines.err).splitlines() if line.startswith("prepare ")]
    return {name: next(line for line in first if f" {name}:" in line) for name in ("code", "plays")}


def test_another_template_makes_chats_again_and_text_not(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tokens(load_project(path))
    file = path.parent / "teacher" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<turn>", "<turn>the "))
    lines = said(path, capsys)
    assert lines["code"].endswith("already done")
    assert lines["plays"].endswith(
        "made again, for what it was made with changed: the chat template or its day"
    )
    after = tokens(load_project(path))
    assert after["code"] == before["code"] and after["plays"] != before["plays"]
    assert all(line.endswith("already done") for line in said(path, capsys).values())


def test_another_attention_or_packing_makes_all_again_and_neither_is_part_of_older_records(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(*settings: str) -> dict[str, Any]:
        return prepare(load_project(path, list(settings)))["code"]["train"].record

    assert record()["attention"] == "document"
    window = record("attention=window")
    older = {
        "version",
        "tokenizer_digest",
        "text_rules",
        "seq_len",
        "prepare",
        "fields",
        "shard_tokens",
        "sources",
    }
    assert set(window) == older, "tokens from before there was a choice are those of attention: window"
    lines = said(path, capsys, "attention=window")
    assert all(line.endswith("already done") for line in lines.values())
    assert said(path, capsys)["code"].endswith("changed: attention")
    assert said(path, capsys, "domains.code.packing=whole")["code"].endswith("changed: packing")
    assert said(path, capsys)["code"].endswith("changed: packing")


def test_filling_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = prepare(load_project(path))["plays"]
    text = capsys.readouterr()
    facts = splits["train"].facts
    share = 1 - facts.tokens / (32 * facts.windows)
    assert f"{facts.windows:,} windows, {share:.1%} filling" in " ".join((text.out + text.err).split())


def test_another_normalizer_makes_all_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(load_project(path))
    file = path.parent / "teacher" / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}'))
    lines = said(path, capsys)
    assert all("how the tokenizer turns text into ids" in line for line in lines.values())


def test_a_template_of_the_manifest(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(load_project(path))
    (path.parent / "other.jinja").write_text(OTHER)
    named = "prepare.chat_template=other.jinja"
    assert "the chat template" in said(path, capsys, named)["plays"]
    project = load_project(path, [named])
    tokenizer = shared_tokenizer(project, tokenizer_digest(make_tokenizer(path.parent / "same")))
    assert tokenizer.chat_template == OTHER  # the student is saved with it
    assert "<turn>the user 2024\nhow deep" in tokenizer.decode(
        prepare(project)["plays"]["train"].tokens[:].ravel()
    )
    assert "the chat template or its day" in said(path, capsys, named, "prepare.date=2031-05-01")["plays"]
    assert said(path, capsys, named, "prepare.date=2031-05-01")["code"].endswith("already done")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff", "not UTF-8"), (b"a\n{% for m in %}", r"bad.jinja:2: ")],
)
def test_a_template_file_that_is_none(path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (path.parent / "bad.jinja").write_bytes(content)
    with pytest.raises(DdkError, match=rf"prepare.chat_template: .*{message}"):
        prepare(load_project(path, ["prepare.chat_template=bad.jinja"]))


def test_days_in_a_manifest(path: Path) -> None:
    for text in ("2024-02-29", "'2024-02-29'"):  # YAML reads the first as a day
        day = load_project(path, [f"prepare.date={text}"]).manifest.prepare.date
        assert datetime.date.fromisoformat(day) == datetime.date(2024, 2, 29)
    for text in ("today", "20240229", "2024-01-01 10:00:00", "7"):
        with pytest.raises(DdkError, match=r"prepare.date: .*YYYY-MM-DD"):
            load_project(path, [f"prepare.date={text}"])
    with pytest.raises(DdkError, match=r"2023-02-29 cannot be read .*; write it in quotes, or mend it"):
        load_project(path, ["prepare.date=2023-02-29"])

"""A tokenizer or template edited between `cache-teacher` and `distill`: the student would be saved with rules it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer, write_jsonl, write_project

from ddk_pipe.pipeline.cache import read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.prepare import check_rules

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"how deep at {i}?"},
            {"role": "assistant", "content": f"{i} m"},
        ]
    }
    for i in range(60)
]
SHORT = {"steps": 1, "batch_tokens": 64, "interval_steps": 1, "validation_windows": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cached project of a domain of text (code) and one of chats (plays), with a teacher of its own."""
    teacher = tmp_path / "teacher"
    make_model(teacher, vocab_size=len(make_tokenizer(teacher).get_vocab()))
    path = write_project(tmp_path, teacher, distill=SHORT)
    write_jsonl(tmp_path / "text" / "plays.jsonl", CHATS)
    cache_teacher(load_project(path))
    return path


def rewrite(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.slow
def test_an_edited_template(path: Path) -> None:
    rewrite(path.parent / "teacher" / "chat_template.jinja", "<turn>", "<turn>the ")
    project = load_project(path)
    with pytest.raises(
        DdkError, match=r"tokenizer: the chat template or its day changed since .*domain plays"
    ):
        distill(project)
    assert not project.run.exists()
    rewrite(path.parent / "teacher" / "chat_template.jinja", "<turn>the ", "<turn>")
    distill(project)
    rewrite(path.parent / "teacher" / "chat_template.jinja", "<turn>", "<turn>the ")
    with pytest.raises(DdkError, match="the chat template or its day changed"):
        distill(project)  # finished, but not by these rules


@pytest.mark.slow
def test_a_template_or_day_of_the_manifest(path: Path) -> None:
    (path.parent / "other.jinja").write_text("{% for m in messages %}<turn>{{ m.content }}<eos>{% endfor %}")
    with pytest.raises(DdkError, match="the chat template or its day changed"):
        distill(load_project(path, ["prepare.chat_template=other.jinja"]))
    # a template that shows no day is the same on every day, and a domain of text alone has none
    distill(load_project(path, ["prepare.date=2031-05-01"]))


@pytest.mark.slow
def test_an_edited_normalizer(path: Path) -> None:
    """The text has no capital that a teacher would see: made again, the tokens are the same, and the cache is as good."""
    before = read_spec(load_project(path).cache)
    rewrite(
        path.parent / "teacher" / "tokenizer.json",
        '"normalizer": null',
        '"normalizer": {"type": "Replace", "pattern": {"String": "\\u2603"}, "content": "snow"}',
    )
    project = load_project(path)
    with pytest.raises(DdkError, match=r"tokenizer: how the tokenizer turns text into ids changed since"):
        distill(project)
    cache_teacher(project)
    assert read_spec(project.cache).domains == before.domains
    distill(project)


def test_caches_that_do_not_say(path: Path) -> None:
    project = load_project(path)
    for encoding in (None, {}, [1], {"plays": 7}, {"elsewhere": {"text_rules": "?"}}):
        check_rules(project, encoding, what="a cache")
    with pytest.raises(DdkError, match=r"changed since a cache was made \(domain code\)"):
        check_rules(project, {"code": {"text_rules": 7}}, what="a cache")

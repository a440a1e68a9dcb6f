from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer
from transformers import AutoTokenizer

from ddk_pipe.pipeline.text import Encoder, chat_rules, text_rules, tokenizer_digest

Edit = Callable[[dict[str, Any]], Any]


def digests(folder: Path, date: str = "2024-07-26") -> tuple[str, str, str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, name="t", date=date)
    return tokenizer_digest(tokenizer), text_rules(encoder), chat_rules(encoder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path)
    return tmp_path


def edit(folder: Path, change: Edit) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def post_processor(values: dict[str, Any]) -> None:
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<turn>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<turn>": {"id": "<turn>", "ids": [1], "tokens": ["<turn>"]}},
    }


EDITS: dict[str, Edit] = {
    "normalizer": lambda values: values.update(normalizer={"type": "NFC"}),
    "pre-tokenizer": lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
    "merges": lambda values: values["model"]["merges"].reverse(),
    "a merge less": lambda values: values["model"]["merges"].pop(),
    "ignore_merges": lambda values: values["model"].update(ignore_merges=True),
    "post-processor": post_processor,
    "a flag of an added token": lambda values: values["added_tokens"][1].update(lstrip=True),
}


@pytest.mark.parametrize("name", EDITS)
def test_text_rules_cover_all_that_turns_text_into_ids(folder: Path, name: str) -> None:
    before = digests(folder)
    edit(folder, EDITS[name])
    after = digests(folder)
    assert after[1] != before[1]
    assert after[0] == before[0]  # its ids mean what they meant: teachers and students still share it


def test_rules_are_of_the_text_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = digests(folder)
    edit(folder, lambda values: values.update(truncation=None, padding=None, version="1.0"))
    merges = lambda values: values["model"].update(
        merges=[" ".join(pair) for pair in values["model"]["merges"]]
    )
    edit(folder, merges)  # as older versions of the library write them
    assert digests(folder) == before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(["a", "b c"], padding=False, truncation=True, max_length=4)  # leaves the library in that state
    assert text_rules(Encoder(tokenizer, name="t")) == before[1]
    other = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(other)
    assert digests(other) == before


def test_a_template_changes_the_rules_of_chats_alone(folder: Path) -> None:
    before = digests(folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    after = digests(folder)
    assert after[:2] == before[:2] and after[2] != before[2]


def test_the_day_matters_where_a_template_writes_it(folder: Path) -> None:
    assert digests(folder, "2025-01-31") == digests(folder)
    file = folder / "chat_template.jinja"
    file.write_text("{{ strftime_now('%Y') }}" + file.read_text())
    assert digests(folder, "2025-01-31")[2] != digests(folder)[2]

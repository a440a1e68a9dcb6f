from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project, load_sweep
from ddk_pipe.pipeline.manifest.yaml_text import parse_yaml

TWICE = {
    "a: 1\nb: 2\na: 3\n": r"m: line 3: the key a is there twice \(first on line 1\)",
    "a: {b: 1, b: 1}\n": r"m: line 1: the key b is there twice \(first on line 1\)",
    "a:\n  - b: 1\n    'b': 2\n": r"m: line 3: the key b is there twice \(first on line 2\)",
    "x: &x {b: 1, b: 2}\ny: *x\n": r"m: line 1: the key b is there twice",
    "config: {1: a, 0x1: b}\n": r"m: line 1: the key 0x1 is there twice",
    "a:\n": None,
    "a: {b: 1}\nc: {b: 2}\n": None,
}


@pytest.mark.parametrize("text", TWICE)
def test_a_key_twice_is_refused_with_its_lines(text: str) -> None:
    expected = TWICE[text]
    if expected is None:
        assert parse_yaml(text, "m") == yaml.safe_load(text)
        return
    with pytest.raises(DdkError, match=expected):
        parse_yaml(text, "m")


@pytest.mark.parametrize(
    "key", ["no", "on", "Yes", "null", "~", "7", "1.5e+3", "2024-01-01", "0x1f", "12:30", ".inf"]
)
def test_a_name_that_yaml_takes_for_something_else_is_to_be_quoted(key: str) -> None:
    with pytest.raises(
        DdkError, match=rf'm: line 2: the key .* is no name.*write it in quotes: "{re.escape(key)}"'
    ):
        parse_yaml(f"domains:\n  {key}: {{train: a.txt}}\n", "m")
    assert parse_yaml(f"domains:\n  '{key}': 1\n", "m") == {"domains": {key: 1}}


def test_a_configuration_of_others_may_have_numbers_for_keys() -> None:
    text = "student: {config: {id2label: {0: a, 1: b}}}\n"
    assert parse_yaml(text, "m") == yaml.safe_load(text)


def test_anchors_and_merges_go_on_working() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {z: 0}\nc: {<<: *a, x: 5}\nd: {<<: [*a, *b], y: 6}\ne: *a\nf: {<<: *a, <<: *b}\n"
    assert parse_yaml(text, "m") == yaml.safe_load(text)
    assert parse_yaml(text, "m")["c"] == {"x": 5, "y": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 2024-13-45\n", r"m: line 1: 2024-13-45 cannot be read \(month"),
        ("b: 1\na: " + "7" * 5000, r"m: line 2: 7+ cannot be read"),
        ("[" * 5000, r"m: YAML that nests too deep"),
        ("a: [\n", r"m: line 2 "),
        ("a: 1\n---\nb: 2\n", r"m: line 2 "),
        ("a: !!python/object:os.system {}\n", r"m: line 1 could not determine a constructor"),
        ("a: &a [*a]\n", r"m: an anchor that holds itself"),
        ("a: \0", r"m: not YAML"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(DdkError, match=expected) as caught:
        parse_yaml(text, "m")
    assert "\n" not in str(caught.value)


NAMES = st.text(st.characters(whitelist_categories=["L", "N"]), min_size=1, max_size=6)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
)


@given(VALUES)
def test_what_has_no_key_twice_is_what_safe_load_reads(value: Any) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text, "m") == yaml.safe_load(text) == value


def test_manifests_sweeps_and_overrides_are_read_so(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    whole = "domains: {a: {train: a.jsonl}}\nteacher: {model: t}\n"
    for text, expected in [
        (whole + "seq_len: 8\nseq_len: 16\n", r"m\.yaml: line 4: the key seq_len is there twice"),
        (
            whole.replace("a:", "no:", 1),
            r"m\.yaml: line 1: the key no is no name: YAML reads it as bool False",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(DdkError, match=expected):
            load_project(path)
    path.write_text("manifest: m\ngrid: {distill.gamma: [0, 1]}\ngrid: {distill.alpha: [0, 1]}\n")
    with pytest.raises(DdkError, match=r"m\.yaml: line 3: the key grid is there twice"):
        load_sweep(path)
    path.write_text(whole)
    with pytest.raises(DdkError, match=r"--set distill=.*the key steps is there twice"):
        load_project(path, ["distill={steps: 1, steps: 2}"])

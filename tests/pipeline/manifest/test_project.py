from __future__ import annotations

from pathlib import Path

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DatasetSource, Project, load_project

SMALLEST = "domains: {a: {train: a.jsonl}}\nteacher: {model: t}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Project:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return load_project(path, list(overrides))


def test_two_lines_are_enough(tmp_path: Path) -> None:
    manifest = load(tmp_path, SMALLEST).manifest
    assert manifest.domains["a"].train == ["a.jsonl"]
    assert (manifest.cache.scheme, manifest.cache.tau, manifest.cache.temperatures) == ("pps", 0.02, [1.0])
    assert (manifest.distill.gamma, manifest.distill.alpha, manifest.distill.mixing) == (0.2, 0.5, "ddk")


def test_overrides_reach_every_depth_and_keep_types(tmp_path: Path) -> None:
    manifest = load(
        tmp_path,
        SMALLEST,
        "distill.optimizer.learning_rate=1e-4",  # YAML 1.1 reads this as text
        "cache.temperatures=[1.0, 2.0]",
        "domains.b={train: [b.txt, {dataset: x, split: test}]}",
        "student.keep_layers=[0, 1]",
    ).manifest
    assert manifest.distill.optimizer.learning_rate == 1e-4
    assert manifest.cache.temperatures == [1.0, 2.0]
    assert manifest.domains["b"].train == ["b.txt", DatasetSource(dataset="x", split="test")]
    assert manifest.student and manifest.student.keep_layers == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SMALLEST + "sequence_length: 5\n", "sequence_length: unknown key"),
        (SMALLEST + "seqlen: 5\n", "did you mean seq_len"),
        ("teacher: {model: t}\n", "domains: missing"),
        (SMALLEST + "seq_len: many\n", "seq_len: Input should be a valid integer"),
        (SMALLEST + "cache: {scheme: top_k}\n", "cache.scheme"),
        (SMALLEST.replace("a:", "'a/b':"), "domain name 'a/b'"),
        (SMALLEST.replace("a:", "'..':"), "domain name '..'"),
        (SMALLEST + "cache: {temperatures: []}\n", "cache.temperatures"),
        (SMALLEST + "distill: {name: ../x}\n", "distill.name"),
        (SMALLEST + "student: {model: a, config: b}\n", "exactly one of"),
        (
            SMALLEST + "distill: {targets: online, tail: renormalise}\n",
            "distill: tail: renormalise is about a cache",
        ),
    ],
)
def test_mistakes_are_one_line_with_file_and_field(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DdkError) as caught:
        load(tmp_path, text)
    assert expected in str(caught.value) and "m.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_relative_paths_stay_inside_and_absolute_ones_are_the_users_word(tmp_path: Path) -> None:
    project = load(tmp_path, SMALLEST)
    assert project.path("a/b", field="f") == tmp_path / "a" / "b"
    assert project.path("/somewhere", field="f") == Path("/somewhere")
    assert project.path("a/../b", field="f").resolve() == tmp_path / "b"
    for bad in ("..", "../x", "a/../../x"):
        with pytest.raises(DdkError, match="leaves the manifest's folder"):
            project.path(bad, field="f")
    (tmp_path / "out").symlink_to("/etc")
    with pytest.raises(DdkError, match="leaves"):
        project.path("out/passwd", field="f")


def test_model_names_are_folders_where_there_is_one_and_ids_otherwise(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    project = load(tmp_path, SMALLEST)
    assert project.model("teacher", field="f") == str(tmp_path / "teacher")
    assert project.model("org/name", field="f") == "org/name"
    assert project.cache.name == str(tmp_path / "out" / "cache")

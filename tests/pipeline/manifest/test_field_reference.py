from __future__ import annotations

from pathlib import Path

from ddk_pipe.pipeline.manifest import STARTER, load_project, reference


def test_starter_parses(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(STARTER)
    assert load_project(path).manifest.student is not None


def test_reference_names_every_field_once_with_a_meaning() -> None:
    rows = list(reference())
    names = [name for name, *_ in rows]
    assert len(names) == len(set(names)) > 60
    assert all(meaning for _, _, _, meaning in rows)
    assert ("seq_len", "int", "1024", "tokens per window") in rows

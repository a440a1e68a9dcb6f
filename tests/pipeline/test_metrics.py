from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from ddk_pipe.pipeline.metrics import Record, read_rows


def test_rows_survive_a_cut_line_and_resume_drops_what_came_after(tmp_path: Path) -> None:
    record = Record(tmp_path, last_step=-1)
    for step in range(5):
        record.add("steps", {"step": step, "loss": 1.0 / (step + 1)})
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_rows(tmp_path, "steps")] == [0, 1, 2, 3, 4]
    Record(tmp_path, last_step=2).publish()
    assert pq.read_table(tmp_path / "steps.parquet").column("step").to_pylist() == [0, 1, 2]
    assert not (tmp_path / "validation.parquet").exists()

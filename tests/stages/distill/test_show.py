"""The domain weights for people."""

from __future__ import annotations

from ddk_pipe.stages.distill.show import weight_lines


def test_bars_show_shares() -> None:
    lines = weight_lines(["code", "plays"], [0.25, 0.75], [0.5, -0.125])
    assert [line.count("█") for line in lines] == [8, 22]
    assert "25.0%" in lines[0] and "gap -0.125" in lines[1]

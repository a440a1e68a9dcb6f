"""The figures of a variant, and the files that keep them: one table for each version of triton that was tried."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from ddk_pipe.triton_kernels.compile_gate.variants import Variant

TABLE = Path(__file__).with_name("tables") / f"{triton.__version__}.json"  # of the version that is installed


@dataclass(frozen=True)
class Row:
    """What a variant takes of its target."""

    variant: Variant
    registers: int  # of a thread; vector registers on AMD
    spill_bytes: int  # of a thread's stack frame, which on these kernels holds nothing but spills
    shared_bytes: int  # of a program
    matrix_instructions: int  # in the program's text


def write_table(rows: Sequence[Row], path: Path = TABLE) -> None:
    """One row a line, so that a change of one shows as one."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n')

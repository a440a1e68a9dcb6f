"""The program: compiles, prints, writes, and says what is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddk_pipe.triton_kernels.compile_gate.checks import complaints
from ddk_pipe.triton_kernels.compile_gate.compiling import measure
from ddk_pipe.triton_kernels.compile_gate.figures import TABLE, write_table
from ddk_pipe.triton_kernels.compile_gate.lists import KNOWN_SPILLERS, shipped, unusual


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; exit status 1 if a variant spills that must not, or the other way round."""
    parser = argparse.ArgumentParser(
        prog="compile_gate", description="Compiles all that ships, and refuses spills."
    )
    parser.add_argument("--common", action="store_true", help="only what runs as a rule")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.parent.name}/{TABLE.name}")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    rows = []
    for variant in [*shipped(), *KNOWN_SPILLERS, *([] if options.common else unusual())]:
        row = measure(variant)
        rows.append(row)
        print(
            f"{row.registers:4d} registers {row.spill_bytes:5d} B spilled {row.shared_bytes:6d} B shared"
            f" {row.matrix_instructions:4d} matrix  {variant}",
            flush=True,
        )
    for path in [TABLE] * options.write + [options.json] * bool(options.json):
        write_table(rows, path)
    found = complaints(rows)
    print("\n".join(found) or f"{len(rows)} variants, as they should be")
    sys.exit(1 if found else 0)

"""Compiles every kernel in every launch that ships, for four targets, and refuses register spills. No GPU needed.

    python -P -c 'from ddk_pipe.triton_kernels import compile_gate; compile_gate.main()'           check all
    python -P -c 'from ddk_pipe.triton_kernels import compile_gate; compile_gate.main(["--write"])' a new table

The compiler alone decides registers, spills and shared memory, and triton's wheel brings all it needs (ptxas,
cuobjdump; LLVM for AMD), so a spill is found before anyone rents the GPU. `compile_table.json` keeps the figures.
A gate that never fires is no gate: some variants are known to spill, and have to.

What it cannot show: speed, races, wrong numbers. None of these kernels has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from ddk_pipe.triton_kernels.sparse_kl import LAUNCHES, Launch, sparse_kl_rows

TABLE = Path(__file__).with_name("compile_table.json")


@dataclass(frozen=True)
class Target:
    gpu: Any  # GPUTarget
    shared_bytes: int  # what one program may use; the compiler does not check it


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),  # H100, H200
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """One compiled form of sparse_kl_rows."""

    target: str
    dtype: str
    kept: int
    block: int
    warps: int
    temperature_1: bool
    gradient: bool = True
    aligned: bool = True  # V and the row stride are multiples of 16, so that loads are wide
    must_spill: bool = False

    def __str__(self) -> str:
        return " ".join(
            [
                f"{self.target} {self.dtype} kept={self.kept} block={self.block} w{self.warps}",
                "T=1" if self.temperature_1 else "T!=1",
                *([] if self.gradient else ["loss only"]),
                *([] if self.aligned else ["unaligned"]),
                *(["must spill"] if self.must_spill else []),
            ]
        )


@dataclass(frozen=True)
class Row:
    """What a variant takes of its target."""

    variant: Variant
    registers: int  # of a thread; vector registers on AMD
    spill_bytes: int  # of a thread's stack frame, which on these kernels holds nothing but spills
    shared_bytes: int  # of a program


def shipped(launches: Iterable[Launch] = LAUNCHES, dtypes: Iterable[str] = ("bf16", "fp32")) -> list[Variant]:
    """Every launch on every target: T = 1 and not, gradient on."""
    return [
        Variant(target, dtype, launch.kept, launch.block(DTYPES[dtype]), launch.warps, temperature_1)
        for launch in launches
        for target in TARGETS
        for dtype in dtypes
        for temperature_1 in (True, False)
    ]


def unusual() -> list[Variant]:
    """What is rarer: float16, V that is no multiple of 16 (50257, say), and the loss without gradient."""
    return [
        *shipped(dtypes=["fp16"]),
        *(replace(v, aligned=False) for v in shipped()),
        *(replace(v, gradient=False) for v in shipped() if not v.temperature_1),
    ]


# Launches far too greedy for their target, one for each of the two compilers.
KNOWN_SPILLERS = [
    Variant("sm_90", "bf16", 256, 16384, 4, temperature_1=False, must_spill=True),
    Variant("gfx942", "bf16", 256, 32768, 4, temperature_1=False, must_spill=True),
]


def gate(variants: Iterable[Variant]) -> Iterator[Row]:
    """Compiles one after the other; half a second each, nothing if triton's cache has it."""
    with _fp_fusion_said():
        for variant in variants:
            yield _compile(variant)


def complaints(rows: Iterable[Row]) -> list[str]:
    """What is wrong with them, one sentence each. Empty: the gate is open."""
    found = []
    for row in rows:
        limit = TARGETS[row.variant.target].shared_bytes
        if row.variant.must_spill and not row.spill_bytes:
            found.append(
                f"{row.variant}: no longer spills; find another that does, and perhaps ship this one"
            )
        elif row.spill_bytes and not row.variant.must_spill:
            found.append(f"{row.variant}: spills {row.spill_bytes} bytes a thread")
        if row.shared_bytes > limit:
            found.append(f"{row.variant}: {row.shared_bytes} bytes of shared memory, the target has {limit}")
    return found


def read_table(path: Path = TABLE) -> tuple[str, list[Row]]:
    """The triton version of the checked-in table, and its rows."""
    table = json.loads(path.read_text())
    return table["triton"], [
        Row(Variant(**row.pop("variant")), **row) for row in (dict(row) for row in table["rows"])
    ]


def write_table(rows: Sequence[Row], path: Path = TABLE) -> None:
    """One row a line, so that a change of one shows as one."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; exit status 1 if a variant spills that must not, or the other way round."""
    parser = argparse.ArgumentParser(prog="compile_gate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--common", action="store_true", help="leave out float16, unaligned rows, loss only")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    rows = []
    for row in gate([*shipped(), *KNOWN_SPILLERS, *([] if options.common else unusual())]):
        rows.append(row)
        print(
            f"{row.registers:4d} registers {row.spill_bytes:5d} B spilled {row.shared_bytes:6d} B shared",
            end="",
        )
        print(f"  {row.variant}", flush=True)
    for path in [TABLE] * options.write + [options.json] * bool(options.json):
        write_table(rows, path)
    found = complaints(rows)
    print("\n".join(found) or f"{len(rows)} variants, as they should be")
    sys.exit(1 if found else 0)


# The arguments of the kernel as a launch would type them; torch aligns what it allocates to 16 bytes and more.
_TYPES = {
    "LABELS": "*i64",
    "IDS": "*i32",
    "LOG_W": "*fp32",
    "LOG_TAIL": "*fp32",
    "CE": "*fp32",
    "KL": "*fp32",
    "stride": "i32",
    "V": "i32",
    "K": "i32",
    "kl_slope": "fp32",
    "inv_t": "fp32",
    "ignore_index": "i32",
}


def _compile(variant: Variant) -> Row:
    compilable = isinstance(sparse_kl_rows, triton.JITFunction)
    if not compilable:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled then; unset it")
    constants = {
        "KEPT": variant.kept,
        "BLOCK": variant.block,
        "T_IS_1": variant.temperature_1,
        "GRADIENT": variant.gradient,
    }
    types = {"Z": f"*{variant.dtype}"} | _TYPES
    multiples_of_16 = [name for name, kind in types.items() if kind.startswith("*")]
    multiples_of_16 += ["stride", "V"] if variant.aligned else []
    place = sparse_kl_rows.arg_names.index
    source = ASTSource(
        fn=sparse_kl_rows,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    options = {"num_warps": variant.warps}
    compiled = triton.compile(source, target=TARGETS[variant.target].gpu, options=options)
    if "amdgcn" in compiled.asm:
        registers, spill_bytes = _amd_resources(compiled.asm["amdgcn"])
    else:
        registers, spill_bytes = _nvidia_resources(compiled.asm["cubin"])
    return Row(variant, registers, spill_bytes, compiled.metadata.shared)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """STACK is the frame in local memory. Loads from and stores to it appear in the disassembly exactly when it
    is not 0 (all of 72 cubins, counted with nvdisasm, whose half second each is saved here)."""
    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said.stdout + said.stderr)
    if usage is None:
        raise RuntimeError(f"{tool} printed no resource usage: {said.stdout + said.stderr}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def _amd_resources(assembly: str) -> tuple[int, int]:
    """The private segment is a thread's frame; a spilled register counts 4 bytes if it has none there."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{name}")
        return int(found[1])

    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(field("private_segment_fixed_size"), spilled)


@contextmanager
def _fp_fusion_said() -> Iterator[None]:
    """triton 3.9 warns that its default will change; it moves register counts, so say which we mean."""
    name = "TRITON_DEFAULT_FP_FUSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})

"""Compiles every kernel in every launch that ships, for four targets, and refuses register spills. No GPU needed.

    python -P -c 'from ddk_pipe.triton_kernels import compile_gate; compile_gate.main()'           check all
    python -P -c 'from ddk_pipe.triton_kernels import compile_gate; compile_gate.main(["--write"])' a new table

The compiler alone decides registers, spills and shared memory, and triton's wheel brings all it needs (ptxas,
cuobjdump; LLVM for AMD), so a spill is found before anyone rents the GPU. `compile_table.json` keeps the figures.
A gate that never fires is no gate: some variants are known to spill, and have to. Kernels that multiply
matrices must do so on the matrix units, too.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from ddk_pipe.triton_kernels import fused_linear_sparse_kl as fused
from ddk_pipe.triton_kernels.sparse_kl import LAUNCHES, Launch, sparse_kl_rows

TABLE = Path(__file__).with_name("compile_table.json")


@dataclass(frozen=True)
class Target:
    gpu: Any  # GPUTarget
    shared_bytes: int  # what one program may use; the compiler does not check it


MOST_THREADS = 1024  # of a program, on all of them; the compiler does not check it either

TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),  # H100, H200
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Kernel:
    """A kernel and its arguments as a launch types them."""

    function: Any
    types: str  # "NAME:type ...", where "*T" points to the dtype of a variant; int32 if not named
    multiples_of_16: str  # what is one, as are all pointers: torch aligns what it allocates
    matrix: bool = False  # multiplies matrices


KERNELS = {
    "sparse_kl_rows": Kernel(
        sparse_kl_rows,
        "Z:*T LABELS:*i64 IDS:*i32 LOG_W:*fp32 LOG_TAIL:*fp32 CE:*fp32 KL:*fp32 kl_slope:fp32 inv_t:fp32",
        "stride V",  # unless the variant is not `aligned`
    ),
    "tail_lse": Kernel(
        fused.tail_lse,
        "H:*T W:*T LABELS:*i32 IDS:*i32 FIRST:*i32 Z_IDS:*fp32 Z_LABEL:*fp32 TOP:*fp32 TOTAL:*fp32"
        " TOTAL_T:*fp32 inv_t:fp32",
        "D stride_h stride_w",
        matrix=True,
    ),
    "chunk_gradient": Kernel(
        fused.chunk_gradient,
        "H:*T W:*T TOP:*fp32 CE_SCALE:*fp32 KL_SCALE:*fp32 G:*T inv_t:fp32",
        "D stride_h stride_w stride_g",
        matrix=True,
    ),
    "put_ids": Kernel(fused.put_ids, "G:*T IDS:*i32 AT_IDS:*fp32 LABELS:*i32 AT_LABEL:*fp32", "stride_g"),
}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel."""

    kernel: str
    target: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int | None = None  # None: what triton takes by itself
    aligned: bool = True  # V and the row stride are multiples of 16, so that loads are wide
    must_spill: bool = False
    rare: bool = False  # the tests leave it to main()

    def __str__(self) -> str:
        constants = (f"{name}={value}" for name, value in self.constants.items())
        return " ".join(
            [
                f"{self.kernel} {self.target} {self.dtype} w{self.warps}",
                *([] if self.stages is None else [f"s{self.stages}"]),
                *constants,
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
    matrix_instructions: int  # in the program's text


def row_kernel(
    target: str, dtype: str, kept: int, block: int, warps: int, temperature_1: bool, **rest: Any
) -> Variant:
    """A form of sparse_kl_rows; `rest` are other fields of the variant, and gradient=False."""
    gradient = rest.pop("gradient", True)
    constants = {"KEPT": kept, "BLOCK": block, "T_IS_1": temperature_1, "GRADIENT": gradient}
    return Variant("sparse_kl_rows", target, dtype, constants, warps, **rest)


def tile_kernel(
    kernel: str, target: str, dtype: str, launch: fused.Launch, temperature_1: bool, **rest: Any
) -> Variant:
    """A form of tail_lse or chunk_gradient; `rest` are other fields of the variant."""
    backend = TARGETS[target].gpu.backend
    constants = fused.tile_constants(launch, backend, temperature_1)
    if kernel == "chunk_gradient":
        constants["GROUP"] = fused.GROUP
    return Variant(kernel, target, dtype, constants, launch.warps, launch.stages, **rest)


def rows_of(launch: Launch, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """One launch of sparse_kl_rows on every target, T != 1 unless said otherwise."""
    rest = {"temperature_1": False, **rest}
    return [
        row_kernel(target, dtype, launch.kept, launch.block(DTYPES[dtype]), launch.warps, **rest)
        for target in TARGETS
        for dtype in dtypes
    ]


def tiles_of(which: slice, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """Those launches of tail_lse and chunk_gradient on every target, T != 1 unless said otherwise."""
    rest = {"temperature_1": False, **rest}
    return [
        tile_kernel(kernel, target, dtype, launch, **rest)
        for kernel in ("tail_lse", "chunk_gradient")
        for target in TARGETS
        for dtype in dtypes
        for launch in fused.LAUNCHES[TARGETS[target].gpu.backend, DTYPES[dtype].itemsize][which]
    ]


def puts_of(put: fused.Put, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """One launch of put_ids on every target."""
    return [
        Variant("put_ids", target, dtype, {"BLOCK": put.block}, put.warps, **rest)
        for target in TARGETS
        for dtype in dtypes
    ]


DEFAULT, TUNED = (
    slice(1),
    slice(1, None),
)  # of a list of launches: what is taken unless `tuning` is on, and the rest


def shipped() -> list[Variant]:
    """What runs as a rule: the default launches in bfloat16 and float32, what tuning may choose in bfloat16.

    Only at T != 1, which needs more registers; the default rows at both.
    """
    dtypes = ("bf16", "fp32")
    found = [variant for launches in LAUNCHES for variant in rows_of(launches[0], dtypes)]
    found += [
        variant for launches in LAUNCHES for variant in rows_of(launches[0], dtypes, temperature_1=True)
    ]
    found += [
        variant
        for launches in LAUNCHES
        for launch in launches[TUNED]
        for variant in rows_of(launch, ["bf16"])
    ]
    found += [*tiles_of(DEFAULT, dtypes), *tiles_of(TUNED, ["bf16"]), *puts_of(fused.PUTS[0], dtypes)]
    return found


def unusual() -> list[Variant]:
    """All else that ships: float16, tiles at T = 1, V that is no multiple of 16 (50257, say), the loss alone.

    The fused kernels know neither of the last two: what they are given is aligned, and both of them run.
    """
    dtypes = ("bf16", "fp32", "fp16")
    found = []
    for launches in LAUNCHES:
        for launch in launches:
            for one in (True, False):
                found += rows_of(launch, dtypes, temperature_1=one, rare=True)
                found += rows_of(launch, dtypes[:2], temperature_1=one, aligned=False, rare=True)
            found += rows_of(launch, dtypes[:2], gradient=False, rare=True)
    for one in (True, False):
        found += tiles_of(slice(None), dtypes, temperature_1=one, rare=True)
    for put in fused.PUTS:
        found += puts_of(put, dtypes, rare=True)
    common = {str(variant) for variant in shipped()}
    return [variant for variant in found if str(variant) not in common]


# Launches too greedy for their target, of each kind of kernel one for each of the two compilers.
KNOWN_SPILLERS = [
    row_kernel("sm_90", "bf16", 256, 16384, 4, temperature_1=False, must_spill=True),
    row_kernel("gfx942", "bf16", 256, 32768, 4, temperature_1=False, must_spill=True),
    tile_kernel(
        "tail_lse", "sm_80", "fp32", fused.Launch(128, 128, 32, 8, 3), temperature_1=False, must_spill=True
    ),
    tile_kernel(
        "tail_lse", "gfx942", "bf16", fused.Launch(128, 128, 64, 4, 2), temperature_1=False, must_spill=True
    ),
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
        if KERNELS[row.variant.kernel].matrix and not row.matrix_instructions:
            found.append(f"{row.variant}: multiplies without matrix instructions")
        threads = row.variant.warps * TARGETS[row.variant.target].gpu.warp_size
        if threads > MOST_THREADS:
            found.append(f"{row.variant}: {threads} threads, a program may have {MOST_THREADS}")
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
    parser.add_argument("--common", action="store_true", help="only what runs as a rule")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    rows = []
    for row in gate([*shipped(), *KNOWN_SPILLERS, *([] if options.common else unusual())]):
        rows.append(row)
        print(
            f"{row.registers:4d} registers {row.spill_bytes:5d} B spilled {row.shared_bytes:6d} B shared"
            f" {row.matrix_instructions:4d} matrix",
            end="",
        )
        print(f"  {row.variant}", flush=True)
    for path in [TABLE] * options.write + [options.json] * bool(options.json):
        write_table(rows, path)
    found = complaints(rows)
    print("\n".join(found) or f"{len(rows)} variants, as they should be")
    sys.exit(1 if found else 0)


# As PTX and the AMD assembly spell them; what is in the PTX is in the machine code, one for one or more.
_MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_)")


def _compile(variant: Variant) -> Row:
    kernel = KERNELS[variant.kernel]
    compilable = isinstance(kernel.function, triton.JITFunction)
    if not compilable:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled then; unset it")
    source = _source(kernel, variant)
    options = {"num_warps": variant.warps}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    compiled = triton.compile(source, target=TARGETS[variant.target].gpu, options=options)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spill_bytes = _amd_resources(text)
    else:
        text = compiled.asm["ptx"]
        registers, spill_bytes = _nvidia_resources(compiled.asm["cubin"])
    matrix_instructions = len(_MATRIX_INSTRUCTION.findall(text))
    return Row(variant, registers, spill_bytes, compiled.metadata.shared, matrix_instructions)


def _source(kernel: Kernel, variant: Variant) -> ASTSource:
    """The kernel with its arguments typed and specialised as a launch would."""
    named = dict(item.split(":") for item in kernel.types.replace("*T", f"*{variant.dtype}").split())
    names = kernel.function.arg_names
    types = {name: "constexpr" if name in variant.constants else named.get(name, "i32") for name in names}
    multiples_of_16 = [name for name, kind in types.items() if kind.startswith("*")]
    multiples_of_16 += kernel.multiples_of_16.split() if variant.aligned else []
    return ASTSource(
        fn=kernel.function,
        signature=types,
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )


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

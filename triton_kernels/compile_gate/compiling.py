"""Compiling a variant, and reading off the machine code what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from ddk_pipe.triton_kernels.compile_gate.figures import Row
from ddk_pipe.triton_kernels.compile_gate.signatures import KERNELS, Kernel
from ddk_pipe.triton_kernels.compile_gate.targets import TARGETS
from ddk_pipe.triton_kernels.compile_gate.variants import Variant

# As PTX and the AMD assembly spell them; what is in the PTX is in the machine code, one for one or more.
_MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_)")


def measure(variant: Variant) -> Row:
    """Compiles it, in half a second, or in no time if triton's cache has it.

    Raises RuntimeError in the interpreter, where nothing is compiled.
    """
    kernel = KERNELS[variant.kernel]
    compilable = isinstance(kernel.function, triton.JITFunction)
    if not compilable:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled then; unset it")
    source = _source(kernel, variant)
    options = {"num_warps": variant.warps}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    with _fp_fusion_said(), warnings.catch_warnings():
        # Of triton 3.7's own, under Python 3.13: it builds a node of a syntax tree without its field `simple`.
        warnings.filterwarnings("ignore", r"AnnAssign\.__init__ missing", DeprecationWarning)
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

"""vLLM with the int8 kernel that it takes on a CPU with AMX, run by AVX512 where there is no AMX.

Imported by vLLM's worker, by the name of the extension, before it loads a weight.
"""

from __future__ import annotations

import torch
import vllm.model_executor.kernels.linear.scaled_mm.cpu as kernels

from ddk_pipe.stages.teachers.vllm.worker import SelectionExtension


def takes_int8(n: int, k: int, dtype: torch.dtype) -> bool:
    """vLLM's rule for int8 weights on such a CPU, without the look at the CPU."""
    return dtype == torch.int8 and k % 32 == 0 and n % 16 == 0


kernels.check_cpu_sgl_kernel = takes_int8


class AmxExtension(SelectionExtension):
    """The same; what matters is the import."""

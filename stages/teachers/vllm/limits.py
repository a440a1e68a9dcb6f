"""What vLLM's public prompt_logprobs cannot give; known without vLLM."""

from __future__ import annotations

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.targets import Plan


def check_capture(options: manifest.Teacher, plan: Plan) -> None:
    """Raises DdkError where prompt_logprobs cannot give what the plan asks for."""
    if options.vllm.capture != "prompt_logprobs":
        return
    if not plan.has_tail:
        raise DdkError(
            f"cache.scheme: {plan.scheme} needs the whole distribution, which vLLM's prompt_logprobs does not give",
            hint="set teacher.vllm.capture: worker, or scheme: topk or threshold",
        )
    if plan.temperatures != (1.0,):
        raise DdkError(
            "cache.temperatures: vLLM's prompt_logprobs gives T = 1 only",
            hint="set teacher.vllm.capture: worker, or temperatures: [1.0]",
        )


def check_head(options: manifest.Teacher, head_size: int, vocab_size: int) -> None:
    """Raises DdkError where prompt_logprobs would give the padding of the output layer a share of the mass."""
    if options.vllm.capture == "prompt_logprobs" and vocab_size < head_size:
        raise DdkError(
            f"teacher.vllm.capture: the teacher predicts {head_size:,} tokens, the tokenizer has {vocab_size:,}, and"
            " vLLM's prompt_logprobs cannot be cut to them",
            hint="set teacher.vllm.capture: worker",
        )

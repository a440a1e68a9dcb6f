"""Selection inside vLLM's worker processes: the full logits are there for a moment, and never leave.

vLLM's model runner has one method that turns the hidden states of prompt positions into prompt log-probabilities.
The extension replaces it: the same hidden states go through the model's output layer in blocks, the blocks through
`select_logits`, and only what the cache keeps is held until the driver drains it. Requests ask for
`prompt_logprobs=0`, which marks them for that method and stops reads of the prefix cache.

Both model runners of vLLM are served. V1 runs in our tests on a CPU; V2 (the default on GPUs since 0.28) has
the same row arithmetic but has never been run by us. Workers import this module by name; it imports no vllm.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddk_pipe.pipeline.targets import Plan, Selected, head_rows, join, select_logits
from ddk_pipe.stages.teachers.serving import reason

Packed = list[tuple[list[int], str, bytes]]  # shape, dtype and content: crosses processes without pickle
LogitsOf = Callable[[Tensor], Tensor | None]
V1_METHOD, V1_ARGUMENTS = "_get_prompt_logprobs_dict", ["hidden_states", "num_scheduled_tokens"]
V2_METHOD = "compute_prompt_logprobs"
V2_ARGUMENTS = [
    "logits_fn",
    "hidden_states",
    "input_batch",
    "all_token_ids",
    "num_computed_tokens",
    "prompt_lens",
]
ROUNDED = "teacher.logits: float32, and this vLLM rounds them"
STEPS = ("execute_model", "sample_tokens")  # of vLLM's Worker; older ones have the first only


def known_arguments() -> dict[str, list[str]]:
    """What each runner's method must take for our replacement to fit."""
    return {"v1": V1_ARGUMENTS, "v2": V2_ARGUMENTS}


def arguments_of(owner: Any) -> list[str] | None:
    """Arguments of the method that is replaced in a runner's class, None where there is none."""
    method = getattr(owner, V1_METHOD, None) or getattr(owner, V2_METHOD, None)
    return list(inspect.signature(method).parameters)[1:] if method else None


def pack(selected: Selected) -> Packed:
    """A selection as plain arrays."""
    arrays = [tensor.contiguous().numpy() for tensor in selected.on_host().tensors()]
    return [(list(array.shape), str(array.dtype), array.tobytes()) for array in arrays]


def unpack(packed: Packed) -> Selected:
    """Inverse of pack."""
    return Selected.of_tensors(
        [
            torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())
            for shape, dtype, content in packed
        ]
    )


class Collector:
    """Selections of running prompts, piece by piece (chunked prefill) until each prompt is whole.

    A prompt is a document without its last token: that position has no label, and its row is made here.
    """

    def __init__(self, plan: Plan, vocab_size: int, *, wide: bool = False) -> None:
        """`wide`: logits must come in float32, of a model in 16 bits."""
        self.wide = wide
        self.plan, self.vocab_size, self.rows = plan, vocab_size, head_rows(vocab_size)
        self.expected: dict[str, tuple[Tensor, Tensor]] = {}  # request -> labels [L], uniforms [T, L, n]
        self.pieces: dict[str, list[tuple[int, Selected]]] = {}
        self.done: dict[str, Packed] = {}
        self.failed: dict[str, str] = {}

    def expect(
        self, request: str, key: str, labels: bytes, first: int = 0, positions: int | None = None
    ) -> None:
        """Announce a request: its window's key, its own labels (int64 [L]), the first of its places in the window, and
        the positions of the window (none: L)."""
        values = np.frombuffer(labels, np.int64).copy()
        uniforms = self.plan.uniforms(key, positions or len(values))[:, first : first + len(values)]
        self.expected[request] = torch.from_numpy(values), torch.from_numpy(uniforms)

    def add(self, internal_id: str, start: int, hidden: Tensor, logits_of: LogitsOf) -> None:
        """Positions [start, start + len(hidden)) of a prompt.

        A piece computed again (after a preemption) replaces what it overlaps.
        """
        request = internal_id.rsplit("-", 1)[0]  # vLLM appends "-<8 hex digits>" to the id it was given
        if request not in self.expected:  # a warm-up request of vLLM's own
            return
        labels, uniforms = self.expected[request]  # on the host, where select_logits wants them
        kept = [piece for piece in self.pieces.get(request, []) if piece[0] < start]
        parts = []
        for at in range(0, len(hidden), self.rows):
            logits = logits_of(hidden[at : at + self.rows])
            if logits is None:  # a tensor-parallel rank without logits; the gather inside is a collective,
                continue  # so leaving the loop early would hang the other ranks
            if self.wide and logits.dtype != torch.float32:
                self.failed[request] = f"{ROUNDED}, in {str(logits.dtype).removeprefix('torch.')}"
                return
            rows = slice(start + at, start + at + len(logits))
            try:
                logits = logits[:, : self.vocab_size]  # beyond the tokenizer's ids: padding
                parts.append(select_logits(logits, labels[rows], self.plan, uniforms[:, rows]))
            except FloatingPointError as problem:
                self.failed[request] = str(problem)
                return
        if parts:
            kept.append((start, join(parts)))
        self.pieces[request] = kept
        if start + len(hidden) >= len(labels) - 1:
            self._finish(request)

    def _finish(self, request: str) -> None:
        pieces = self.pieces.pop(request)
        labels, uniforms = self.expected.pop(request)
        at = 0
        for start, piece in pieces:
            if start != at:
                self.failed[request] = f"positions {at} to {start} were never computed"
                return
            at += len(piece.label_logprobs)
        if pieces:
            computed = join([piece for _, piece in pieces]).on_host()
            blank = torch.zeros(len(labels) - at, self.vocab_size)
            last = select_logits(blank, torch.full((len(blank),), -1), self.plan, uniforms[:, at:])
            self.done[request] = pack(join([computed, last]))

    def take(self) -> dict[str, Any]:
        """What is done or failed since the last call."""
        out = {"done": self.done, "failed": self.failed}
        self.done, self.failed = {}, {}
        return out


def v1_method(collector: Collector) -> Callable[..., dict[str, Any]]:
    """Replacement of GPUModelRunner._get_prompt_logprobs_dict (vllm/v1/worker/gpu_model_runner.py)."""

    def method(runner: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        for request_id in list(runner.num_prompt_logprobs):
            scheduled = num_scheduled_tokens.get(request_id)
            if scheduled is None:  # preempted, or not part of this step
                continue
            request = runner.requests[request_id]
            length, start = len(request.prompt_token_ids), request.num_computed_tokens
            rows = min(scheduled, length - start)
            first = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            collector.add(request_id, start, hidden_states[first : first + rows], runner.model.compute_logits)
            if start + rows >= length:
                del runner.num_prompt_logprobs[request_id]
        return {}

    return method


def v2_method(collector: Collector) -> Callable[..., dict[str, Any]]:
    """Replacement of PromptLogprobsWorker.compute_prompt_logprobs (vllm/v1/worker/gpu/sample/prompt_logprob.py)."""

    def method(
        worker: Any,
        logits_fn: LogitsOf,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        for index, request_id in enumerate(input_batch.req_ids):
            slot = int(input_batch.idx_mapping_np[index])
            start = int(input_batch.num_computed_prefill_tokens_np[index])
            length = int(prompt_lens[slot])
            resumed_after_prompt = length < int(input_batch.prefill_len_np[index])
            if not worker.uses_prompt_logprobs[slot] or start >= length or resumed_after_prompt:
                continue
            rows = min(int(input_batch.num_scheduled_tokens[index]), length - start)
            first = int(input_batch.query_start_loc_np[index])
            collector.add(request_id, start, hidden_states[first : first + rows], logits_fn)
        return {}

    return method


def noting(step: Callable[..., Any], notes: str) -> Callable[..., Any]:
    """`step`; the first line of what it raises is appended to the file `notes` before it goes on its way."""

    @functools.wraps(step)
    def noted(*arguments: Any, **options: Any) -> Any:
        try:
            return step(*arguments, **options)
        except Exception as problem:
            with suppress(OSError), open(notes, "a", encoding="utf-8") as file:
                file.write(f"{reason(problem)}\n")
            raise

    return noted


class SelectionExtension:
    """Mixed into vLLM's Worker by `worker_extension_cls`; vLLM asserts that no name here exists on Worker."""

    model_runner: Any

    def ddk_note_failures(self, notes: str) -> None:
        """Note in this file what a step raises: the driver hears from another process only that the engine is dead."""
        for name in STEPS:
            if hasattr(self, name):
                setattr(self, name, noting(getattr(self, name), notes))

    def ddk_install(self, plan: dict[str, Any], vocab_size: int, wide: bool = False) -> str:
        """Take the place of the prompt-logprobs method; returns the model runner's kind, or why it cannot."""
        self._ddk_collector = Collector(Plan.from_dict(plan), vocab_size, wide=wide)
        runner, target, name, known, replacement = self._ddk_target()
        if target is None:
            return f"refused: {type(self.model_runner).__module__} is neither the V1 nor the V2 model runner"
        arguments = list(inspect.signature(getattr(target, name)).parameters)
        if arguments != known:
            return f"refused: {name} takes {arguments}, expected {known}"
        setattr(target, name, types.MethodType(replacement(self._ddk_collector), target))
        return runner

    def ddk_uninstall(self) -> None:
        """Give vLLM its own method back."""
        _, target, name, _, _ = self._ddk_target()
        target.__dict__.pop(name, None)

    def _ddk_target(self) -> tuple[str, Any, str, list[str], Callable[[Collector], Callable[..., Any]]]:
        worker = getattr(self.model_runner, "prompt_logprobs_worker", None)
        if hasattr(self.model_runner, V1_METHOD):
            return "v1", self.model_runner, V1_METHOD, V1_ARGUMENTS, v1_method
        return "v2", worker, V2_METHOD, V2_ARGUMENTS, v2_method

    def ddk_expect(self, requests: list[tuple[Any, ...]]) -> None:
        """Announce requests, each by the arguments of Collector.expect."""
        for request in requests:
            self._ddk_collector.expect(*request)

    def ddk_take(self) -> dict[str, Any]:
        """Fetch what is done: {"done": {request: Packed}, "failed": {request: reason}}."""
        return self._ddk_collector.take()

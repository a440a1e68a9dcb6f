"""The teacher through transformers: any causal language model, on one device or spread over several GPUs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import (
    Documents,
    check_causal,
    decoder_of,
    forward_ends_in,
    head_is_plain,
    hidden_states,
    keeps_documents_apart,
    load_causal_lm,
    stack_starts,
)
from ddk_pipe.pipeline.targets import Plan, Selected, head_rows, join, select_logits
from ddk_pipe.stages.common import SPREAD, pick_device, pick_dtype, say
from ddk_pipe.stages.teachers.precision import OTHERWISE, widen, widens
from ddk_pipe.stages.teachers.protocol import Window
from ddk_pipe.stages.teachers.serving import Service

ROOM = 0.8  # share of a GPU's free memory that weights may take: the rest is for hidden states and logits


class HfTeacher:
    """Runs the decoder on batches of whole windows, and the output layer on blocks of positions.

    Held at once: the hidden states of a batch and the logits [head_rows, V] of one block. Selection happens where
    the logits are; only what is kept goes to the host.
    """

    def __init__(self, folder: Path, options: manifest.Teacher, *, vocab_size: int | None = None) -> None:
        self.folder = folder
        self.device = torch.device(pick_device(options.device))
        dtype = pick_dtype(options.dtype, self.device)
        self.spread = choose_spread(folder, options.device, self.device)
        name = str(dtype).removeprefix("torch.")
        self.service = Service(f"transformers {transformers.__version__}", folder, name, other="vllm")
        with self.service.one_line("cannot load"):
            model = load_causal_lm(
                folder,
                field="teacher.model",
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                device_map=self.spread,
            )
            self.model = (model if self.spread else model.to(self.device)).eval()
            check_placed(self.model, self.device)
            check_causal(self.model, field="teacher.model")
            self.head = Head(self.model, vocab_size, wide=widens(options, dtype))
        self.batch_windows = options.batch_windows if self.head.in_blocks else 1

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": f"{self.device.type}, {self.spread}" if self.spread else str(self.device),
        }

    def close(self) -> None:
        del self.model, self.head

    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        out: list[Selected] = []
        with torch.inference_mode(), self.service.one_line("cannot serve"):
            for start in range(0, len(windows), self.batch_windows):
                batch = windows[start : start + self.batch_windows]
                tokens = self.to_model(torch.from_numpy(np.stack([window.tokens for window in batch])))
                starts = stack_starts([window.starts for window in batch], tokens.shape[1])
                hidden = self.head.states(tokens, Documents.of(starts))
                out += [self._window(hidden[row], window, plan) for row, window in enumerate(batch)]
        return out

    def to_model(self, tokens: Tensor) -> Tensor:
        """The same where the model's first layer is."""
        return tokens.to(self.model.get_input_embeddings().weight.device)

    def _window(self, hidden: Tensor, window: Window, plan: Plan) -> Selected:
        labels = torch.from_numpy(window.labels)
        uniforms = torch.from_numpy(plan.uniforms(window.key, len(window.tokens)))
        rows = head_rows(self.vocab_size)
        parts = []
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits = self.head.logits(hidden[block])
            try:
                parts.append(select_logits(logits, labels[block], plan, uniforms[:, block]))
            except FloatingPointError as problem:
                raise DdkError(
                    f"window {window.key}: {problem} (model {self.folder})", hint="try teacher.dtype: float32"
                ) from None
        return join(parts).on_host()


class Head:
    """From hidden states to logits in blocks of rows, cut to `vocab_size`, as the model's own forward gives them.

    Plain models: the output layer. Models that cap or scale logits (Gemma, Cohere, Granite): their own forward around
    a stand-in for the decoder. Models that do not let themselves be taken apart so: whole logits, `in_blocks` False.
    `wide`: a model in 16 bits, whose logits are to be float32.
    """

    def __init__(self, model: Any, vocab_size: int | None, *, wide: bool = False) -> None:
        self.model = model
        self.layer = model.get_output_embeddings()
        rows = int(self.layer.weight.shape[0])
        self.vocab_size = min(vocab_size or rows, rows)
        self.plain = head_is_plain(model)
        self.in_blocks = self.plain or self._stand_in_is_right()
        self.wide = wide
        if wide:  # after the model's own words are known
            widen(self.layer)

    def states(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """tokens int64 [B, L] -> last hidden states [B, L, d]; whole logits [B, L, V] where not in_blocks."""
        model = decoder_of(self.model) if self.in_blocks else self.model
        if documents is None:
            return hidden_states(model, tokens)
        return hidden_states(model, tokens, documents.to(tokens.device), apart=self.apart)

    @functools.cached_property
    def apart(self) -> bool:
        """True of a model whose documents must have rows of their own; tried out before the first of them."""
        apart = not keeps_documents_apart(self.model)
        if apart:
            say(
                f"teacher: {type(self.model).__name__} does not keep documents of a row apart; each has a row of its own"
            )
        return apart

    def logits(self, states: Tensor) -> Tensor:
        """states [N, d] -> logits [N, vocab_size]."""
        logits: Tensor = states
        if self.plain:
            logits = self.layer(states)
        elif self.in_blocks:
            logits = self._own_forward(states)
        if self.wide and logits.dtype != torch.float32:
            raise DdkError("teacher.logits: float32, and this model rounds them once more", hint=OTHERWISE)
        return logits[:, : self.vocab_size]

    def _own_forward(self, states: Tensor) -> Tensor:
        tokens = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        with _standing_in(decoder_of(self.model), states[None]):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[0]

    def _stand_in_is_right(self) -> bool:
        try:
            return forward_ends_in(self.model, lambda states: self._own_forward(states[0])[None])
        except Exception:  # noqa: BLE001 - a forward that wants more of its decoder than hidden states
            return False


@contextmanager
def _standing_in(decoder: Any, states: Tensor) -> Iterator[None]:
    """Inside, the decoder answers every call with these hidden states [1, N, d]."""
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:  # accelerate's, of a model spread over devices
            decoder.forward = before


def choose_spread(folder: Path, named: str, device: torch.device) -> str | None:
    """The device map of a teacher spread over all GPUs, None for one device.

    Spread if the manifest says so, or (`auto`) if one GPU has no room and there are others.
    Raises DdkError without the package accelerate.
    """
    spread = named if named in SPREAD else None
    if named == "auto" and device.type == "cuda" and torch.cuda.device_count() > 1:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        free, _ = torch.cuda.mem_get_info(0)
        spread = "balanced" if weights > ROOM * free else None
    if spread and importlib.util.find_spec("accelerate") is None:
        raise DdkError(
            f"teacher.device: {named} spreads the teacher over several GPUs, and accelerate is not installed",
            hint="pip install accelerate",
        )
    return spread


def check_placed(model: Any, device: torch.device) -> None:
    """Raises DdkError if a part of the model was left on the host or on disk because the GPUs are too small."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if device.type == "cuda" and places & {"cpu", "disk"}:
        raise DdkError(
            "teacher: it does not fit the GPUs here, and would be moved from host memory for every batch",
            hint="use more or larger GPUs, or teacher.dtype: bfloat16",
        )

"""The teacher through transformers: any causal language model, on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import head_is_plain
from ddk_pipe.pipeline.selection import Plan, Selected, head_rows, join, select_logits
from ddk_pipe.stages.runtime import pick_device, pick_dtype
from ddk_pipe.stages.teachers.protocol import Window


class HfTeacher:
    """Runs the decoder on whole windows, and the output layer on blocks of positions.

    Logits of a whole batch would be windows * seq_len * vocabulary floats. Models whose forward changes the
    output layer's result (soft-capping, scaling) are noticed at the start and run through their own forward.
    """

    def __init__(self, folder: Path, options: manifest.Teacher) -> None:
        self.device = torch.device(pick_device(options.device))
        dtype = pick_dtype(options.dtype, self.device)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=options.trust_remote_code
        )
        self.model = model.to(self.device).eval()
        self.batch_windows = options.batch_windows
        self.head = self.model.get_output_embeddings()
        self.plain_head = head_is_plain(self.model)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": str(self.device),
        }

    def close(self) -> None:
        del self.model, self.head

    @torch.inference_mode()
    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        out: list[Selected] = []
        for start in range(0, len(windows), self.batch_windows):
            batch = windows[start : start + self.batch_windows]
            tokens = torch.from_numpy(np.stack([window.tokens for window in batch])).to(self.device)
            hidden = self._hidden(tokens)
            out += [self._window(hidden[row], window, plan) for row, window in enumerate(batch)]
        return out

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states [B, L, d]; or logits [B, L, V] of a model whose head is not plain."""
        if self.plain_head:
            hidden: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return hidden
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def _window(self, hidden: Tensor, window: Window, plan: Plan) -> Selected:
        labels = torch.from_numpy(window.labels).to(self.device)
        uniforms = torch.from_numpy(plan.uniforms(window.key, len(window.tokens))).to(self.device)
        rows = head_rows(self.vocab_size)
        parts = []
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits = self.head(hidden[block]) if self.plain_head else hidden[block]
            try:
                parts.append(select_logits(logits, labels[block], plan, uniforms[:, block]))
            except FloatingPointError as problem:
                raise DdkError(f"window {window.key}: {problem}", hint="try teacher.dtype: float32") from None
        return to_cpu(join(parts))


def to_cpu(selected: Selected) -> Selected:
    """The same selection in the host's memory."""
    return Selected(selected.label_logprobs.cpu(), tuple(targets.to("cpu") for targets in selected.targets))

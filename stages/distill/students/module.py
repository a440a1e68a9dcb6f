"""The student as training sees it: a model whose forward is the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ddk_pipe.pipeline.losses import (
    DenseTargets,
    LabelledRows,
    SparseKdLoss,
    linear_dense_kd,
    linear_sparse_kd,
    measure,
    measure_rows,
    rows_sparse_kd,
)
from ddk_pipe.pipeline.models import Documents, decoder_of, hidden_states, text_config
from ddk_pipe.pipeline.targets import SparseTargets
from ddk_pipe.stages.distill.students.layers import layer_list


class DistillStudent(nn.Module):
    """A causal language model whose forward returns the distillation loss: logits are never held.

    The loss reads the last hidden states and the output layer's weight, so it runs inside the forward,
    where wrappers such as FSDP2 have the weight whole (facts/infrastructure.md). A soft cap of the model's
    configuration (Gemma) is the loss's too. `apart`: of a model that does not keep documents of a window apart.
    """

    def __init__(self, lm: Any, *, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.lm = lm
        self.softcap = logit_softcap(lm)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        targets: LabelledRows | SparseTargets | DenseTargets,
        *,
        documents: Documents | None = None,
        measuring: bool = False,
        **options: Any,
    ) -> SparseKdLoss | Tensor:
        """tokens, labels int64 [windows, seq_len]; targets of the windows * seq_len positions, sparse, sparse and checked
        (of those that have a label), or the whole distribution.

        `documents`: where they lie in the windows, none for windows that are seen whole. `measuring`: the sums of `pipeline.losses.measure` in place of the loss.
        """
        hidden = hidden_states(decoder_of(self.lm), tokens, documents, apart=self.apart).flatten(0, 1)
        head = self.lm.get_output_embeddings()
        layer: dict[str, Any] = {"bias": getattr(head, "bias", None), "softcap": self.softcap}
        if isinstance(targets, DenseTargets):
            return linear_dense_kd(hidden, head.weight, labels.flatten(), targets, **layer, **options)
        if isinstance(targets, LabelledRows):
            of_rows = measure_rows if measuring else rows_sparse_kd
            return of_rows(hidden, head.weight, targets, **layer, **options)
        of_all = measure if measuring else linear_sparse_kd
        return of_all(hidden, head.weight, labels.flatten(), targets, **layer, **options)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers."""
        return layer_list(self.lm, int(text_config(self.lm.config).num_hidden_layers))[2]


def logit_softcap(lm: Any) -> float | None:
    """c > 0 of a model whose logits are c tanh(raw / c) of its output layer's (`final_logit_softcapping`)."""
    cap = getattr(text_config(lm.config), "final_logit_softcapping", None)
    return None if cap is None else float(cap)

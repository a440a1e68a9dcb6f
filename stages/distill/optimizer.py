"""AdamW with its state made at once, so that a checkpoint can be read into it before the first step."""

from __future__ import annotations

import torch

from ddk_pipe.pipeline.manifest import Distill


def make_optimizer(student: torch.nn.Module, options: Distill) -> torch.optim.AdamW:
    """AdamW (fused); weight decay on matrices only. Moments are zero, as AdamW itself makes them in its first step."""
    matrices = [parameter for parameter in student.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in student.parameters() if parameter.ndim < 2]
    chosen = options.optimizer
    groups = [
        {"params": matrices, "weight_decay": chosen.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=chosen.learning_rate, betas=chosen.betas, fused=True)
    for parameter in student.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer

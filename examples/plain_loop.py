"""Distil from a cache in a plain PyTorch loop:  python examples/plain_loop.py out/cache STUDENT NEW_FOLDER [STEPS]"""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddk_pipe

BATCH, INTERVAL, GAMMA = 4, 10, 0.2


def loss_of(model, batch, gamma):
    """CE + gamma * KL of a batch, summed over its labels; never holds [tokens, vocabulary]."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    labels, targets = batch["labels"].flatten().to(model.device), batch["targets"].to(model.device)
    head = model.get_output_embeddings().weight
    return ddk_pipe.linear_sparse_kd(hidden.flatten(0, 1), head, labels, targets, gamma=gamma)


@torch.no_grad()
def student_ce(model, data):
    """Per domain, nats per token."""
    sums = np.zeros((len(data.domains), 2))
    for index in range(len(data)):
        loss = loss_of(model, ddk_pipe.collate([data[index]]), 0.0)
        sums[data.place(index)[0]] += float(loss.ce), loss.positions
    return sums[:, 0] / sums[:, 1]


def main(cache, student, to, steps=100):
    train, validation = (ddk_pipe.CachedWindows(cache, split) for split in ("train", "validation"))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    teacher_ce = validation.teacher_ce()
    rule = ddk_pipe.make_rule("ddk", alpha=0.5, sizes=train.sizes)
    order = ddk_pipe.DomainBatches(train, batch_windows=BATCH, steps=INTERVAL, seed=0)
    order.weights = ddk_pipe.ddk_initial(student_ce(model, validation), teacher_ce)
    for _ in range(0, int(steps), INTERVAL):
        for batch in DataLoader(train, batch_sampler=order, collate_fn=ddk_pipe.collate):
            loss = loss_of(model, batch, GAMMA)
            (loss.total / loss.positions).backward()
            optimizer.step()
            optimizer.zero_grad()
        gap = student_ce(model, validation) - teacher_ce
        order.weights = rule(order.weights, gap + teacher_ce, teacher_ce)
        print(f"gap {gap.mean():.3f} nats/token, weights {order.weights.round(3)} of {train.domains}")
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(student).save_pretrained(to)


if __name__ == "__main__":
    main(*sys.argv[1:])

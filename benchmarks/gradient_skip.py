"""Training with gradient_skip against the exact loss: is the final validation loss the same within noise?

    PYTHONPATH=benchmarks python benchmarks/gradient_skip.py [--json OUT] [--text FILE.jsonl.gz] [--seeds 4]
        [--steps 60] [--tau 1e-3] [--work DIR]

The student is SmolLM2-135M's first and last layer under its own output layer (V = 49152, d = 576). It learns from the
whole model's top 64 with a bucket, by AdamW with clipping, as stage two does it. A seed is an order of the data; each
is trained twice, exactly and with gradient_skip, and the two are compared. Text: Python's own sources, or the "text"
of a file's lines. What is done is kept in DIR (runs/benchmarks/gradient_skip): the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, TEACHER, Row, goal, report

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import torch
from loss_problem import K
from torch import Tensor

from ddk_pipe.pipeline.losses import gradient_skip
from ddk_pipe.pipeline.targets import SparseTargets, stack, top_with_tail
from ddk_pipe.stages.distill import DistillStudent

WINDOW = 128  # tokens
BATCH = 2  # windows of a step
VALIDATION = 16  # windows
KEPT_LAYERS = (0, -1)
RATE, CLIP = 1e-3, 1.0
T_95 = {
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # Student's, by degrees of freedom


@dataclass(frozen=True)
class Plan:
    """What a result depends on."""

    text: str
    windows: int  # of training
    steps: int
    tau: float

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Data:
    """tokens, labels int64 [windows, WINDOW]; targets of windows * WINDOW positions."""

    tokens: Tensor
    labels: Tensor
    targets: SparseTargets

    def windows(self, index: Tensor) -> tuple[Tensor, Tensor, SparseTargets]:
        positions = (index[:, None] * WINDOW + torch.arange(WINDOW)).flatten()
        return self.tokens[index], self.labels[index], self.targets.rows(positions)


def read_text(path: str) -> Iterator[str]:
    if not path:
        yield from (inspect.getsource(module) for module in (argparse, subprocess, inspect, statistics, gzip))
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def make_data(plan: Plan, path: Path) -> Data:
    """Windows and their targets, from the teacher or from what an earlier call wrote."""
    if not path.exists():
        saved = teach(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(saved, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    tokens, labels, ids, logprobs, tail = torch.load(path, weights_only=True)
    return Data(tokens, labels, SparseTargets(ids=ids, logprobs=logprobs, tail=tail))


@torch.inference_mode()
def teach(plan: Plan) -> list[Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ddk_pipe.stages.demo.material import write_teacher

    write_teacher(TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    wanted = (plan.windows + VALIDATION) * WINDOW + 1
    texts = (tokenizer(text, verbose=False).input_ids for text in read_text(plan.text))
    tokens = torch.tensor(list(itertools.islice(itertools.chain.from_iterable(texts), wanted)))
    if len(tokens) < wanted:
        raise SystemExit(f"{len(tokens):,} tokens of text, {wanted:,} wanted: give --text another file")
    inputs, labels = tokens[:-1].view(-1, WINDOW), tokens[1:].view(-1, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    parts = [
        top_with_tail(model(input_ids=some).logits.flatten(0, 1).softmax(1), K, floor=0.0)
        for some in torch.split(inputs, BATCH)
    ]
    targets = stack(parts)
    return [inputs.clone(), labels.clone(), targets.ids, targets.logprobs, targets.tail]


def student() -> DistillStudent:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    lm.model.layers = torch.nn.ModuleList([lm.model.layers[index] for index in KEPT_LAYERS])
    lm.config.num_hidden_layers = len(KEPT_LAYERS)
    return DistillStudent(lm)


def train(data: Data, plan: Plan, seed: int, tau: float | None) -> Row:
    """One run: the validation loss at its end, and the seconds of CPU of its median step."""
    model = student().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    order, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10**6 + seed)
    seconds, skipped = [], Counted(gradient_skip.GradientSkip.pays)
    gradient_skip.GradientSkip.pays = skipped  # type: ignore[method-assign,assignment]
    chosen = torch.cat([torch.randperm(plan.windows, generator=order) for _ in range(epochs(plan))])
    for step in range(plan.steps):
        began = time.process_time()
        optimizer.param_groups[0]["lr"] = RATE * rate(step / plan.steps)
        batch = data.windows(chosen[step * BATCH : (step + 1) * BATCH])
        loss = model(*batch, gamma=1.0, gradient_skip=tau, generator=noise)
        (loss.total / loss.positions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    gradient_skip.GradientSkip.pays = skipped.inner  # type: ignore[method-assign]
    share = sum(skipped.answers) / max(len(skipped.answers), 1)
    found = {"seed": seed, "gradient_skip": tau, "step_seconds_median": statistics.median(seconds)}
    return {**found, **validate(model, data, plan), "chunks_skipped_share": share}


class Counted:
    """GradientSkip.pays, whose answers are kept: whether a chunk was skipped or done exactly."""

    def __init__(self, inner: Callable[..., bool]) -> None:
        self.inner, self.answers = inner, list[bool]()

    def __get__(self, instance: Any, _: Any) -> Callable[[Tensor], bool]:
        def pays(gradient: Tensor) -> bool:
            self.answers.append(self.inner(instance, gradient))
            return self.answers[-1]

        return pays


@torch.no_grad()
def validate(model: DistillStudent, data: Data, plan: Plan) -> Row:
    """Nats per position on windows that were not trained on."""
    model.eval()
    index = torch.arange(plan.windows, plan.windows + VALIDATION)
    parts = [model(*data.windows(some), gamma=1.0) for some in torch.split(index, BATCH)]
    positions = sum(part.positions for part in parts)
    names = {"validation_loss": "total", "validation_ce": "ce", "validation_kl": "kl"}
    return {key: sum(float(getattr(part, name)) for part in parts) / positions for key, name in names.items()}


def epochs(plan: Plan) -> int:
    return math.ceil(plan.steps * BATCH / plan.windows)


def rate(progress: float) -> float:
    """A tenth of warm-up, then a cosine to a tenth."""
    if progress < 0.1:
        return (progress + 0.01) / 0.11
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def summary(rows: list[Row], tau: float) -> tuple[list[Row], list[Row]]:
    """The paired difference, with its standard error, and the goal it has to meet."""
    pairs: dict[int, dict[bool, Row]] = {}
    for row in rows:
        pairs.setdefault(row["seed"], {})[row["gradient_skip"] is not None] = row
    exact, skip = ([pair[kind] for pair in pairs.values()] for kind in (False, True))
    gaps = [b["validation_loss"] - a["validation_loss"] for a, b in zip(exact, skip, strict=True)]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = T_95[min(len(gaps) - 1, max(T_95))] * error
    between = statistics.stdev(row["validation_loss"] for row in exact)
    times = [statistics.median(row["step_seconds_median"] for row in kind) for kind in (exact, skip)]
    difference: Row = {
        "name": f"gradient_skip {tau:g} less exact, validation loss",
        "mean_nats": mean,
        "standard_error_nats": error,
        "half_width_95_percent_nats": half,
        "between_seeds_deviation_nats": between,
        "step_time_ratio": times[1] / times[0],
    }
    same = abs(mean) <= half <= between
    said = f"{mean:+.4f} +- {half:.4f} nats; seeds differ by {between:.4f}"
    wanted = "the 95 % interval holds 0 and is no wider, to either side, than the seeds' own deviation"
    return [difference], [goal("same final loss within noise", wanted, said, same)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", default="")
    parser.add_argument("--seeds", type=int, default=4, help="at least 4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--tau", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks" / "gradient_skip")
    arguments = parser.parse_args()
    if arguments.seeds < 4:
        parser.error("--seeds: at least 4, or the standard error means nothing")
    torch.set_num_threads(1)
    plan = Plan(arguments.text, arguments.windows, arguments.steps, arguments.tau)
    began = time.process_time()
    taught = hashlib.sha256(f"{plan.text} {plan.windows}".encode()).hexdigest()[:12]
    data = make_data(plan, arguments.work / f"targets-{taught}.pt")
    rows = []
    for seed, tau in itertools.product(range(arguments.seeds), (None, plan.tau)):
        path = arguments.work / f"{plan.name}-{seed}-{'exact' if tau is None else 'skip'}.json"
        if not path.exists():
            path.write_text(json.dumps(train(data, plan, seed, tau)))
        rows.append(json.loads(path.read_text()))
        print(f"seed {seed} tau {tau}: {rows[-1]['validation_loss']:.4f}", flush=True)
    named = [
        {"name": f"seed {r['seed']}, {'exact' if r['gradient_skip'] is None else 'skip'}", **r} for r in rows
    ]
    differences, goals = summary(rows, plan.tau)
    seconds = time.process_time() - began
    shape = {
        "vocab": 49152,
        "width": 576,
        "layers": len(KEPT_LAYERS),
        "k": K,
        "tokens_per_step": BATCH * WINDOW,
    }
    about: dict[str, Any] = {"shape": shape, "plan": asdict(plan), "seconds_of_this_command": seconds}
    report([*named, *differences], goals, arguments.json, **about)


if __name__ == "__main__":
    main()

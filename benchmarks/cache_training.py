"""What sparse teacher targets cost a student in training: its loss above dense targets, the arbiter of the cache.

    PYTHONPATH=benchmarks python benchmarks/cache_training.py [--json OUT] [--seeds 3] [--steps 64] [--beta2 0.95 0.999]
        [--teacher DIR] [--data DIR] [--scratch DIR]

A small student (d = 128, 2 layers, the teacher's vocabulary of 49,152) learns from SmolLM2-135M by pure forward KL,
over six domains. All arms of a seed start from the same checkpoint (cross-entropy on text alone), optimiser state
included, and take the same batches in lockstep: AdamW at a constant rate. An arm's targets come from the dense
distribution by `pipeline.selection` and go through the codec, so that its rounding counts. Figure: KL(teacher ||
student) on held-out text against the dense teacher, minus that of the dense arm, averaged over the last evaluations.

The rate stays constant and the batches are small, so the noise of the targets costs far more here than in a real
run; what counts is its ratio between schemes. AdamW's second moment might bend that: with beta2 = 0.95 it follows the
noise of each arm (rare draws are spikes, and between two of them it decays), with 0.999 it is nearly what the common
pretraining left, so both are run. Every evaluation is kept in SCRATCH/training.json
at once; seeds that are complete there are not run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import TEACHER, Row, report

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import numpy as np
import torch
import torch.nn.functional as F
from cache_goals import REFERENCE, jackknife
from numpy.typing import NDArray
from teacher_states import CORPUS, SCRATCH, WINDOW, Domain, load
from torch import Tensor, nn

from ddk_pipe.pipeline.targets import Codec, Context, Plan, Ranks, SparseTargets, label_codes, select

SCHEMES = {
    REFERENCE: Plan("random", 0.01, 64, 256, 50, (1.0,), 0),
    **{f"pps {tau:g}": Plan("pps", tau, 64, 256, 50, (1.0,), 0) for tau in (0.05, 0.03, 0.02, 0.01)},
}
WIDTH, LAYERS, HEADS = 128, 2, 4
PIECE = 128  # tokens of context of the student
BATCH = 4  # pieces
PRETRAINING = 200  # steps of cross-entropy
RATE = 2e-3
HELD_OUT = 2  # pieces a domain
EVALUATIONS = 6  # evenly over the second half of the steps

Gradient = Callable[[Tensor], Tensor]  # the student's probabilities [n, V] -> d loss / d logits, in place


class Student(nn.Module):
    """Tokens [B, T] -> hidden states [B, T, d]; the embedding is the output layer too."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        directions, sizes, _ = torch.svd_lowrank(
            head, WIDTH
        )  # a start past the steep part: the teacher's own
        table = directions * sizes
        self.table = nn.Parameter(table * (0.05 / table.std()))
        self.places = nn.Parameter(0.02 * torch.randn(PIECE, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(PIECE), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.embedding(tokens, self.table) * (0.02 / 0.05) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        out: Tensor = self.norm(hidden)
        return out


class Arm:
    """A student and its optimiser."""

    def __init__(self, student: Student, beta2: float) -> None:
        self.student, self.beta2 = student, beta2
        self.optimizer = torch.optim.AdamW(
            student.parameters(), RATE, (0.9, beta2), weight_decay=0.0, fused=True
        )

    def twin(self) -> Arm:
        """An equal one, apart."""
        other = Arm(copy.deepcopy(self.student), self.beta2)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def step(self, tokens: Tensor, gradient: Gradient) -> None:
        """One step on the mean over the positions; the output layer's part is written out: no [n, V] is kept."""
        hidden = self.student(tokens)
        states, table = hidden.detach().flatten(0, 1), self.student.table
        with torch.no_grad():
            slope = gradient(torch.softmax(states @ table.t(), 1)).div_(len(states))
            table.grad = slope.t() @ states
            back = slope @ table
        hidden.backward(back.view_as(hidden))
        self.optimizer.step()
        for parameter in self.student.parameters():
            parameter.grad = None


@dataclass(frozen=True)
class Piece:
    """tokens, labels int64 [PIECE]; hidden float16 [PIECE, teacher's d]."""

    tokens: Tensor
    labels: Tensor
    hidden: Tensor


def pieces(domains: list[Domain], part: str, most: int) -> list[Piece]:
    """Pieces of the windows, at most `most` a domain."""
    found = []
    for domain in domains:
        windows = getattr(domain, part)
        starts = [(w, s) for s in range(0, WINDOW, PIECE) for w in range(len(windows.tokens))]
        for w, start in starts[:most]:
            tokens = torch.from_numpy(windows.tokens[w, start : start + PIECE + 1])
            hidden = torch.from_numpy(windows.hidden[w, start : start + PIECE])
            found.append(Piece(tokens[:-1], tokens[1:], hidden))
    return found


def batches(pool: list[Piece], rng: np.random.Generator) -> Iterator[list[Piece]]:
    """Without end, every piece once an epoch."""
    while True:
        order = rng.permutation(len(pool))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield [pool[i] for i in order[start : start + BATCH]]


def pretrained(domains: list[Domain], head: Tensor, beta2: float, rng: np.random.Generator) -> Arm:
    """A student after cross-entropy on text that is not measured."""
    arm = Arm(Student(head), beta2)
    for _ in range(PRETRAINING):
        texts = [domains[i].text for i in rng.integers(len(domains), size=BATCH)]
        starts = [int(rng.integers(len(text) - PIECE - 1)) for text in texts]
        rows = [
            text[start : start + PIECE + 1].astype(np.int64)
            for text, start in zip(texts, starts, strict=True)
        ]
        tokens = torch.from_numpy(np.stack(rows))
        labels = tokens[:, 1:].flatten()

        def slope(q: Tensor, labels: Tensor = labels) -> Tensor:
            q[torch.arange(len(q)), labels] -= 1
            return q

        arm.step(tokens[:, :-1], slope)
    return arm


def through_codec(
    logprobs: Tensor, labels: Tensor, codec: Codec, uniforms: Tensor, key: str
) -> SparseTargets:
    """What a student reads from a cache of the distributions [n, V]."""
    codes = label_codes(logprobs.gather(1, labels[:, None])[:, 0].numpy(), codec.plan.seed, key)
    context = Context(labels.numpy(), codes, key)
    return codec.decode(codec.encode(select(logprobs.exp(), codec.plan, uniforms), context), context)


def minus(targets: SparseTargets) -> Gradient:
    """Gradient of the KL to sparse targets without a tail."""
    row, slot = (targets.ids >= 0).nonzero(as_tuple=True)
    at, weights = (row, targets.ids[row, slot].long()), targets.logprobs[row, slot].exp()

    def gradient(q: Tensor) -> Tensor:
        q[at] -= weights
        return q

    return gradient


@torch.no_grad()
def validation(arms: dict[str, Arm], held_out: list[Piece], head: Tensor) -> dict[str, float]:
    """Mean KL(teacher || student), nats."""
    sums = dict.fromkeys(arms, 0.0)
    for piece in held_out:
        log_p = torch.log_softmax(piece.hidden.float() @ head.t(), 1)
        p = log_p.exp()
        own = float((p * log_p).sum(dtype=torch.float64))
        for name, arm in arms.items():
            logits = arm.student(piece.tokens[None])[0] @ arm.student.table.t()
            crossed = (p * logits).sum(1) - torch.logsumexp(logits, 1)
            sums[name] += own - float(crossed.sum(dtype=torch.float64))
    return {name: total / (len(held_out) * PIECE) for name, total in sums.items()}


def run_seed(
    seed: int, steps: int, beta2: float, domains: list[Domain], head: Tensor, save: Callable[[Row], None]
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    counts = np.sum([np.bincount(domain.text, minlength=len(head)) for domain in domains], axis=0)
    codecs = {name: Codec(plan, Ranks.fit(counts)) for name, plan in SCHEMES.items()}
    held_out = pieces(domains, "measured", HELD_OUT)
    start = pretrained(domains, head, beta2, rng)
    arms = {name: start.twin() for name in ("dense", *SCHEMES)}
    save({"step": 0, **validation({"dense": start}, held_out, head)})
    stream = batches(pieces(domains, "pilot", WINDOW), rng)
    marks = {steps - i * steps // (2 * EVALUATIONS) for i in range(EVALUATIONS)}
    for step in range(1, steps + 1):
        batch = next(stream)
        tokens = torch.stack([piece.tokens for piece in batch])
        labels = torch.cat([piece.labels for piece in batch])
        log_p = torch.log_softmax(torch.cat([piece.hidden for piece in batch]).float() @ head.t(), 1)
        p = log_p.exp()
        arms["dense"].step(tokens, lambda q, p=p: q.sub_(p))  # type: ignore[misc]
        for name, codec in codecs.items():
            uniforms = torch.from_numpy(rng.random((len(p), codec.plan.uniforms_per_position)))
            targets = through_codec(log_p, labels, codec, uniforms, f"{seed}/{step}/{name}")
            arms[name].step(tokens, minus(targets))
        if step in marks:
            save({"step": step, **validation(arms, held_out, head)})


def summary(beta2: float, runs: list[list[Row]]) -> list[Row]:
    """A row per arm, over the runs, one a seed: `above_dense` in nats, `ratio` to RS-KD's; `_se`: by jackknife."""

    def over_seeds(name: str) -> NDArray[np.float64]:
        return np.array([np.mean([evaluation[name] for evaluation in run[1:]]) for run in runs])

    dense = over_seeds("dense")
    reference = over_seeds(REFERENCE) - dense
    rows: list[Row] = [{"name": "dense", "kl": float(dense.mean())}]
    for name in SCHEMES:
        above = over_seeds(name) - dense
        mean, mean_error = jackknife(lambda keep, above=above: float(above[keep].mean()), len(runs))  # type: ignore[misc]
        ratio, ratio_error = jackknife(
            lambda keep, above=above: float(above[keep].mean() / reference[keep].mean()),  # type: ignore[misc]
            len(runs),
        )
        rows.append({"name": name, "above_dense": mean, "above_dense_se": mean_error})
        rows[-1] |= {"ratio": ratio, "ratio_se": ratio_error, "by_seed": above.tolist()}
    return [{"beta2": beta2, "seeds": len(runs), **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.95, 0.999])
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--data", type=Path, default=CORPUS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    domains, head = load(arguments.scratch, arguments.teacher, arguments.data)
    path = arguments.scratch / "training.json"
    runs: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}

    def is_complete(key: str) -> bool:
        return key in runs and runs[key][-1]["step"] == arguments.steps

    keys = {beta2: [f"{beta2:g}/{seed}" for seed in range(arguments.seeds)] for beta2 in arguments.beta2}
    for beta2, seed in itertools.product(arguments.beta2, range(arguments.seeds)):
        key = keys[beta2][seed]
        if is_complete(key):
            continue
        found: list[Row] = []

        def save(evaluation: Row, key: str = key, found: list[Row] = found) -> None:
            found.append(evaluation)
            runs[key] = found
            path.write_text(json.dumps(runs))
            print(key, {name: round(value, 4) for name, value in evaluation.items()}, flush=True)

        run_seed(seed, arguments.steps, beta2, domains, head, save)
    rows = [row for beta2 in keys for row in summary(beta2, [runs[k] for k in keys[beta2] if is_complete(k)])]
    setup: dict[str, Any] = {"width": WIDTH, "layers": LAYERS, "positions": BATCH * PIECE, "rate": RATE}
    setup |= {
        "steps": arguments.steps,
        "pretraining": PRETRAINING,
        "domains": [domain.name for domain in domains],
    }
    report(rows, [], arguments.json, part="training", student=setup)


if __name__ == "__main__":
    main()

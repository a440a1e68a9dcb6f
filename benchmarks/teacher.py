"""What the teacher's stage costs beyond the teacher's forward pass, in tokens per second of process CPU.

    PYTHONPATH=benchmarks python benchmarks/teacher.py --json benchmarks/results/teacher.json

Real vLLM in this process and transformers, on the same windows of real text (Python's standard library), in
alternating runs: bare prefill; vLLM's `prompt_logprobs` of 0 and of 64 (dictionaries, flat); ours with `pps`; the bare
forward of transformers with logits against ours. Then where the time of our step goes.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from common import Row, alternate, goal, report, spread, teacher_option

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()  # before torch

import numpy as np
import torch

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.cache import CacheSpec, CacheWriter, Shard, SplitSize
from ddk_pipe.pipeline.cache import writer as cache_writer
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Ranks, Selected, selection
from ddk_pipe.pipeline.text import TRAIN
from ddk_pipe.stages.cache_teacher.sample import kept_counts
from ddk_pipe.stages.demo.material import write_teacher
from ddk_pipe.stages.teachers import Window
from ddk_pipe.stages.teachers.hf import HfTeacher
from ddk_pipe.stages.teachers.vllm import worker as vllm_worker
from ddk_pipe.stages.teachers.vllm.engine import VllmTeacher, _sampling
from ddk_pipe.stages.teachers.vllm.prompts import prompts_of

PLAN = Plan("pps", 0.02, 64, 256, 50, (1.0,), 0)
SOURCES = (argparse, inspect, urllib.request, tempfile, mock)
Variants = dict[str, Callable[[], Any]]


def text_windows(teacher: Path, count: int, seq_len: int) -> list[Window]:
    """Windows of source text, every position but the last with a label."""
    from transformers import AutoTokenizer

    text = "\n".join(inspect.getsource(module) for module in SOURCES)
    ids = np.array(AutoTokenizer.from_pretrained(teacher)(text, verbose=False).input_ids)
    if len(ids) < count * seq_len:
        raise SystemExit(f"the text has {len(ids):,} tokens: lower --windows or --seq-len")
    rows = ids[: count * seq_len].reshape(count, seq_len)
    shard = Shard("source", TRAIN, 0, 0, count)
    return [Window(shard.key(n), row, np.append(row[1:], NO_LABEL)) for n, row in enumerate(rows)]


# --- vLLM -----------------------------------------------------------------------------------------


def vllm_variants(teacher: VllmTeacher, windows: list[Window]) -> Variants:
    """vLLM's own ways and ours, in one engine: the hook is taken out for theirs."""

    def own(**options: Any) -> Any:
        if teacher._plan is not None:
            teacher.engine.collective_rpc("ddk_uninstall")
            teacher._plan = None
        prompts = [prompt for window in windows for prompt in prompts_of(window)]
        return teacher._generate(prompts, _sampling(**options))

    return {
        "vllm: bare prefill": own,
        "vllm: prompt_logprobs=0": lambda: own(prompt_logprobs=0),
        "vllm: prompt_logprobs=64, dict": lambda: own(prompt_logprobs=64),
        "vllm: prompt_logprobs=64, flat": lambda: own(prompt_logprobs=64, flat_logprobs=True),
        "vllm: ours, pps 0.02": lambda: teacher.select(windows, PLAN),
    }


def head_share(folder: Path, seq_len: int) -> float:
    """The output layer's share of a forward pass's multiply-adds, attention over half the window included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight.numel()
    inputs = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = model.num_parameters() - inputs - (0 if tied else head)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = (
        2 * config.num_hidden_layers * width * seq_len / 2
    )  # scores and their sum, seq_len / 2 on average
    return float(head / (head + body + attention))


# --- transformers ---------------------------------------------------------------------------------


def hf_variants(teacher: HfTeacher, windows: list[Window]) -> Variants:
    """The model's own forward, logits and all, in the batches that ours uses."""
    step = teacher.batch_windows
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, len(tokens), step):
            teacher.model(input_ids=tokens[start : start + step], use_cache=False)

    def small_blocks() -> None:
        with mock.patch.object(selection, "HEAD_BYTES", 64 << 20):
            teacher.select(windows, PLAN)

    return {
        "hf: bare forward with logits": bare,
        "hf: ours, pps 0.02": lambda: teacher.select(windows, PLAN),
        "hf: ours, logits in blocks of 64 MB": small_blocks,
    }


# --- where the time goes --------------------------------------------------------------------------


@contextmanager
def clocked(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Inside, the process-CPU seconds of calls of owner.name add up in `seconds`."""
    real = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return real(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - began

    with mock.patch.object(owner, name, timed):
        yield


def breakdown(teacher: VllmTeacher, windows: list[Window], vocab_size: int) -> dict[str, float]:
    """Process-CPU seconds of the parts of one step: predict, of that select; encode; write and read back."""
    seconds: dict[str, float] = {}
    with clocked(vllm_worker, "select_logits", seconds), clocked(torch, "softmax", seconds):
        began = time.process_time()
        selected = teacher.select(windows, PLAN)
        seconds["predict"] = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder, clocked(cache_writer, "content", seconds):
        writer, shard = open_cache(Path(folder), selected, windows, vocab_size)
        tokens = np.stack([window.tokens for window in windows])
        began = time.process_time()
        writer.write(shard, tokens, np.ones(tokens.shape, np.uint8), selected, {"seconds": 1.0})
        seconds["encode_and_write"] = time.process_time() - began
    return seconds


def open_cache(
    folder: Path, selected: list[Selected], windows: list[Window], vocab_size: int
) -> tuple[CacheWriter, Shard]:
    """A cache for these windows as its one shard, with the rank table of what is kept."""
    spec = CacheSpec(
        teacher={},
        tokenizer_digest="benchmark",
        vocab_size=vocab_size,
        seq_len=len(windows[0].tokens),
        plan=PLAN,
        domains={"source": {TRAIN: SplitSize(len(windows), len(windows), "benchmark")}},
    )
    writer = CacheWriter(LocalFolder(folder), spec)
    writer.add_ranks("source", Ranks.fit(kept_counts(selected, vocab_size)))
    return writer, Shard("source", TRAIN, 0, 0, len(windows))


def breakdown_row(runs: list[dict[str, float]]) -> Row:
    """Medians of the parts, and what selecting, encoding and writing are of the whole step."""
    middle = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    step = middle["predict"] + middle["encode_and_write"]
    parts = {
        "softmax": middle["softmax"],
        "selection_without_softmax": middle["select_logits"] - middle["softmax"],
        "encode": middle["content"],
        "write_and_read_back": middle["encode_and_write"] - middle["content"],
    }
    shares = {f"{name}_share": seconds / step for name, seconds in parts.items()}
    return {"name": "vllm: our step", "step_cpu_seconds": step, **shares, "share": sum(shares.values())}


# --- all of it ------------------------------------------------------------------------------------


def rows_of(variants: Variants, tokens: int, rounds: int) -> dict[str, Row]:
    """Tokens per process-CPU-second of each variant, in alternating runs."""
    rows = {}
    for name, seconds in alternate(variants, rounds).items():
        rates = spread([tokens / value for value in seconds])
        rows[name] = {"name": name, **{f"tokens_per_cpu_second_{key}": rate for key, rate in rates.items()}}
    return rows


def rate(rows: dict[str, Row], name: str) -> float:
    return float(rows[name]["tokens_per_cpu_second_median"])


def vllm_goals(rows: dict[str, Row], head: float, parts: Row) -> list[Row]:
    """The issue's goals for vLLM."""
    ours = rate(rows, "vllm: ours, pps 0.02")
    own = ours / rate(rows, "vllm: prompt_logprobs=0")
    ideal = ours / (rate(rows, "vllm: bare prefill") * (1 - head))
    share = parts["share"]
    return [
        goal("ours of vLLM's own prompt_logprobs=0", ">= 1.0", own, own >= 1.0),
        goal("ours of bare prefill less the output layer's FLOPs", ">= 0.95", ideal, ideal >= 0.95),
        goal("selection (its softmax included), encode and write of a step", "<= 0.05", share, share <= 0.05),
    ]


def measure_vllm(options: argparse.Namespace, windows: list[Window]) -> tuple[list[Row], list[Row]]:
    """Rows and goals of the vLLM engine."""
    settings = manifest.Teacher(
        model="m", batch_windows=len(windows), vllm=manifest.VllmOptions(max_num_batched_tokens=options.step)
    )
    teacher = VllmTeacher(options.teacher, settings, seq_len=options.seq_len)
    rows = rows_of(vllm_variants(teacher, windows), len(windows) * options.seq_len, options.rounds)
    parts = breakdown_row(
        [breakdown(teacher, windows, teacher.vocab_size) for _ in range(max(3, options.rounds))]
    )
    head = head_share(options.teacher, options.seq_len)
    teacher.close()
    return [*rows.values(), parts, {"name": "output layer", "share_of_flops": head}], vllm_goals(
        rows, head, parts
    )


def measure_hf(options: argparse.Namespace, windows: list[Window]) -> tuple[list[Row], list[Row]]:
    """Rows and goal of the transformers backend."""
    teacher = HfTeacher(
        options.teacher, manifest.Teacher(model="m", backend="hf", batch_windows=options.batch)
    )
    rows = rows_of(hf_variants(teacher, windows), len(windows) * options.seq_len, options.rounds)
    ratio = rate(rows, "hf: ours, pps 0.02") / rate(rows, "hf: bare forward with logits")
    return list(rows.values()), [goal("hf: ours of the bare forward", ">= 0.93", ratio, ratio >= 0.93)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    teacher_option(parser)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows of a forward pass, transformers")
    parser.add_argument("--step", type=int, default=2048, help="tokens of an engine step, vLLM")
    parser.add_argument("--part", choices=["vllm", "hf"], action="append", help="only this; may be repeated")
    options = parser.parse_args()
    write_teacher(options.teacher)
    windows = text_windows(options.teacher, options.windows, options.seq_len)
    for part, measure in (("vllm", measure_vllm), ("hf", measure_hf)):
        if not options.part or part in options.part:
            rows, goals = measure(options, windows)
            report(rows, goals, options.json, part=part, windows=options.windows, seq_len=options.seq_len)


if __name__ == "__main__":
    main()

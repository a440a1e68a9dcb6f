"""The real teacher, SmolLM2-135M, through transformers and through real vLLM on the CPU."""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment import assert_aligned, prefix_logprobs
from engines import EXTENSION, select_elsewhere, select_here
from quantised import AWQ, quantise, say_quantised
from tiny import make_model

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import weights_digest
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected
from ddk_pipe.stages.teachers import Teacher, Window, open_teacher

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports use what torch deprecates
]

SEQ_LEN, WINDOWS = 128, 5
TAU = 0.02
TOLERANCE = 5e-4  # of log-probabilities between the engines
NEAR_TAU = 1e-4  # where an entry may be kept by one engine and not by the other


def plan(scheme: str) -> Plan:
    return Plan(scheme, TAU, 16, 256, 50, (1.0, 2.0), 7)


@pytest.fixture(scope="module")
def windows(smollm: Path) -> list[Window]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm)(inspect.getsource(argparse)[:20_000], verbose=False).input_ids
    out = []
    for number in range(WINDOWS):
        tokens = np.array(ids[number * SEQ_LEN : (number + 1) * SEQ_LEN])
        labels = np.append(tokens[1:], NO_LABEL)
        labels[number::17] = NO_LABEL
        out.append(Window(f"code/train/0/{number}", tokens, labels))
    return out


@pytest.fixture(scope="module")
def hf(smollm: Path) -> Teacher:
    return open_teacher(smollm, manifest.Teacher(model="m", batch_windows=3), backend="hf", seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def vllm(smollm: Path, need_vllm: None) -> Iterator[Teacher]:
    """One engine for the whole module: starting it takes 20 s. Chunked prefill: 3 windows do not fit a step."""
    options = manifest.Teacher(
        model="m", batch_windows=3, vllm=manifest.VllmOptions(max_num_batched_tokens=200)
    )
    teacher = open_teacher(smollm, options, backend="vllm", seq_len=SEQ_LEN)
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def from_hf(hf: Teacher, windows: list[Window]) -> dict[str, list[Selected]]:
    return {scheme: hf.select(windows, plan(scheme)) for scheme in ("pps", "threshold", "topk")}


def test_alignment_with_prefixes_fed_one_by_one(
    smollm: Path, windows: list[Window], from_hf: dict[str, list[Selected]]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    window = windows[0]
    truth = prefix_logprobs(model, window.tokens.tolist()[:48])
    selected = from_hf["threshold"][0].rows(slice(0, 48))
    assert_aligned(selected, truth, window.labels.tolist()[:48], tau=TAU, tolerance=TOLERANCE)
    shifted = Selected(selected.label_logprobs.roll(1), (selected.kept[0].rows(torch.arange(48).roll(1)),))
    with pytest.raises(AssertionError):
        assert_aligned(shifted, truth, window.labels.tolist()[:48], tau=TAU, tolerance=TOLERANCE)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk"])
def test_vllm_agrees_with_transformers(
    vllm: Teacher, windows: list[Window], from_hf: dict[str, list[Selected]], scheme: str
) -> None:
    """Log-probabilities within 5e-4; the same kept ids wherever no probability lies near tau.

    Under pps the draws from the rest follow the cumulated probabilities: a difference in the fifth digit may
    move one, so there the head is compared, and the draws as a share.
    """
    assert vllm.vocab_size == 49_152
    assert_agree(scheme, windows, from_hf[scheme], vllm.select(windows, plan(scheme)))


def assert_agree(
    scheme: str, windows: list[Window], ones: list[Selected], others: list[Selected], vocab_size: int = 49_152
) -> None:
    """Two engines on the same windows, as test_vllm_agrees_with_transformers says."""
    same_draws = positions = 0
    for window, one, other in zip(windows, ones, others, strict=True):
        labelled = torch.from_numpy(window.labels) >= 0
        assert torch.equal(~one.label_logprobs.isnan(), labelled)
        assert torch.equal(~other.label_logprobs.isnan(), labelled)
        gap = (one.label_logprobs - other.label_logprobs)[labelled].abs()
        assert float(gap.max()) <= TOLERANCE
        for a, b in itertools.zip_longest(one.targets, other.targets):
            a.validate(vocab_size), b.validate(vocab_size)
            for row in labelled.nonzero()[:, 0].tolist():
                x, y = kept(a, row), kept(b, row)
                positions, same_draws = positions + 1, same_draws + (set(x) == set(y))
                if scheme == "topk":
                    differ = set(x) ^ set(y)  # near-ties at the k-th place may swap
                    smallest = min(x.values())
                    assert all(abs((x | y)[token] - smallest) <= NEAR_TAU for token in differ)
                    continue
                for token in set(x) | set(y):
                    p = max(x.get(token, 0.0), y.get(token, 0.0))
                    if p >= TAU + NEAR_TAU and (scheme == "threshold" or p > 2 * TAU):
                        assert abs(np.log(x[token]) - np.log(y[token])) <= TOLERANCE
    assert same_draws / positions > (0.8 if scheme == "pps" else 0.95)


def kept(targets: object, row: int) -> dict[int, float]:
    ids, logprobs = targets.ids[row].tolist(), targets.logprobs[row].exp().tolist()  # type: ignore[attr-defined]
    return {token: p for token, p in zip(ids, logprobs, strict=True) if token >= 0}


def with_documents(window: Window) -> Window:
    """The same tokens as documents of 1, 2, 29 and 96 tokens, of which the second has no label."""
    starts = np.isin(np.arange(SEQ_LEN), [0, 1, 3, 32])
    labels = window.labels.copy()
    labels[:-1][starts[1:]] = NO_LABEL
    labels[1] = NO_LABEL
    return Window(window.key, window.tokens, labels, starts)


@pytest.mark.parametrize("scheme", ["pps", "threshold"])
def test_documents_do_not_see_each_other_in_either_engine(
    vllm: Teacher, hf: Teacher, windows: list[Window], scheme: str
) -> None:
    islands = [with_documents(window) for window in windows]
    of_hf = hf.select(islands, plan(scheme))
    assert_agree(scheme, islands, of_hf, vllm.select(islands, plan(scheme)))
    (alone,) = hf.select([Window("alone", islands[0].tokens[32:], islands[0].labels[32:])], plan(scheme))
    gap = (of_hf[0].label_logprobs[32:] - alone.label_logprobs).nan_to_num().abs()
    assert float(gap.max()) <= TOLERANCE
    (whole,) = hf.select(windows[:1], plan(scheme))
    assert float((whole.label_logprobs[32:] - alone.label_logprobs).nan_to_num().abs().max()) > 0.1


def test_a_second_plan_and_a_second_call_keep_their_windows_apart(
    vllm: Teacher, windows: list[Window]
) -> None:
    one = vllm.select(windows, plan("threshold"))
    other = vllm.select(windows[::-1], plan("threshold"))[::-1]
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a.label_logprobs, b.label_logprobs, atol=TOLERANCE, equal_nan=True)


def test_plain_prompt_logprobs_gives_the_same_topk(vllm: Teacher, windows: list[Window]) -> None:
    """vLLM's public interface, in the same engine: no hook is installed for these requests' results."""
    from ddk_pipe.stages.teachers.vllm.engine import VllmTeacher

    assert isinstance(vllm, VllmTeacher)
    simple = Plan("topk", TAU, 16, 256, 50, (1.0,), 7)
    hooked = vllm.select(windows, simple)
    public = vllm.options.model_copy(
        update={"vllm": vllm.options.vllm.model_copy(update={"capture": "prompt_logprobs"})}
    )
    vllm.engine.collective_rpc("ddk_uninstall")
    vllm._plan, vllm.options, before = None, public, vllm.options
    try:
        plain = vllm.select(windows, simple)
    finally:
        vllm.options = before
    for a, b in zip(hooked, plain, strict=True):
        assert torch.allclose(a.label_logprobs, b.label_logprobs, atol=TOLERANCE, equal_nan=True)
        for row in range(SEQ_LEN):
            x, y = kept(a.targets[0], row), kept(b.targets[0], row)
            assert len(set(x) ^ set(y)) <= 2 and all(abs(x[t] - y[t]) < NEAR_TAU for t in set(x) & set(y))
        speaks = a.targets[0].tail > float("-inf")
        assert torch.equal(speaks, b.targets[0].tail > float("-inf"))
        assert torch.allclose(a.targets[0].tail[speaks].exp(), b.targets[0].tail[speaks].exp(), atol=1e-4)


OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
SAME_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
BATCHES = {
    "vllm here, all windows in one step, 16 at once": ("vllm", 16, 8192, SAME_PROCESS),
    "vllm in its own process, steps of 130 tokens, one window at once": ("vllm", 1, 130, OWN_PROCESS),
    "vllm in its own process, steps of 300 tokens, 16 at once": ("vllm", 16, 300, OWN_PROCESS),
    "hf, one window at once": ("hf", 1, 8192, {}),
    "hf, 16 at once": ("hf", 16, 8192, {}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_engines_processes_chunks_and_batches_agree(
    smollm: Path, need_vllm: None, windows: list[Window], from_hf: dict[str, list[Selected]], name: str
) -> None:
    """Against transformers in float32 with three windows at once; the V1 runner, as V2 needs a GPU."""
    backend, batch, step, environment = BATCHES[name]
    options = manifest.Teacher(
        model="m",
        backend=backend,
        batch_windows=batch,
        vllm=manifest.VllmOptions(max_num_batched_tokens=step),
    )
    schemes = ["pps", "threshold", "topk"]
    plans = [plan(scheme) for scheme in schemes]
    if backend == "hf":
        found = select_here(smollm, options, windows, plans)
    else:
        found = select_elsewhere(smollm, options, windows, plans, environment=environment)
    for scheme, others in zip(schemes, found, strict=True):
        assert_agree(scheme, windows, from_hf[scheme], others)


def random_windows(vocab_size: int) -> list[Window]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(3):
        tokens = rng.integers(0, vocab_size, 40)
        made.append(Window(f"d/train/0/{number}", tokens, np.append(tokens[1:], NO_LABEL)))
    return made


def test_vllm_cuts_a_padded_head(tmp_path: Path, need_vllm: None) -> None:
    """config.vocab_size 512 is what vLLM cuts to; the tokenizer's 385 ids are what we cut to."""
    folder = make_model(tmp_path, vocab_size=512, hidden_size=128)  # heads of 32: vLLM has no smaller ones
    made, plans = random_windows(385), [plan("threshold"), plan("topk")]
    one, other = (
        select(folder, manifest.Teacher(model="m", backend=backend), made, plans, vocab_size=385)
        for backend, select in (("hf", select_here), ("vllm", select_elsewhere))
    )
    for scheme, a, b in zip(("threshold", "topk"), one, other, strict=True):
        assert_agree(scheme, made, a, b, vocab_size=385)


def make_quantised(folder: Path, **how: bool) -> Path:
    return quantise(make_model(folder, vocab_size=385, hidden_size=128, intermediate_size=128), **how)


def from_transformers(
    folder: Path, windows: list[Window], plans: list[Plan], dtype: Any
) -> list[list[Selected]]:
    options = manifest.Teacher(model="m", dtype=dtype)
    opened = open_teacher(folder, options, backend="hf", seq_len=40, vocab_size=385)
    return [opened.select(windows, each) for each in plans]


def apart(ones: list[Selected], others: list[Selected]) -> float:
    """Root mean square of the differences of the labels' log-probabilities, nats."""
    gaps = [one.label_logprobs - other.label_logprobs for one, other in zip(ones, others, strict=True)]
    return float(torch.cat(gaps).square().nanmean().sqrt())


KERNELS = {"of this CPU": EXTENSION, "of a CPU with AMX": "amx.AmxExtension"}
REFUSAL = (
    r"teacher\.model: vLLM \S+ cannot serve \S+ in float32 \(int8_scaled_mm_with_quant: expect A to be bfloat16 or"
    r" half\.\); set teacher\.dtype: bfloat16, or backend: hf "
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_quantised_weights_in_both_engines(tmp_path: Path, need_vllm: None, kernel: str) -> None:
    """Int8 weights and activations, as compressed-tensors stores them: transformers unpacks them and rounds the
    activations in float32, vLLM multiplies int8. Products of int8 are exact in both, so in float32 the tolerance is that
    of dense teachers. vLLM's kernel for CPUs with AMX takes 16 bits only, and finds a step for each token's activations
    itself: it says so while serving, here from a process of its own, and what the hint names is as close to
    transformers in float32 as transformers is in bfloat16, whichever way it rounds the activations.
    Both are far below what quantising does to this teacher."""
    if kernel != "of this CPU" and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX512: it cannot run that kernel")
    int8, made, plans = (
        make_quantised(tmp_path / "int8"),
        random_windows(385),
        [plan("threshold"), plan("topk")],
    )
    dense = make_model(tmp_path / "dense", vocab_size=385, hidden_size=128, intermediate_size=128)
    assert weights_digest(dense) != weights_digest(int8)
    truth = from_transformers(int8, made, plans, "float32")
    quantising = apart(from_transformers(dense, made, plans, "float32")[0], truth[0])

    def serve(dtype: Any, environment: dict[str, str]) -> list[list[Selected]]:
        options = manifest.Teacher(model="m", backend="vllm", dtype=dtype)
        return select_elsewhere(
            int8, options, made, plans, vocab_size=385, environment=environment, extension=KERNELS[kernel]
        )

    try:
        exact = serve("float32", SAME_PROCESS if kernel == "of this CPU" else OWN_PROCESS)
    except DdkError as refused:
        assert re.match(REFUSAL, str(refused)), refused
    else:
        assert kernel == "of this CPU"
        for scheme, a, b in zip(("threshold", "topk"), truth, exact, strict=True):
            assert_agree(scheme, made, a, b, vocab_size=385)
        assert quantising > 1000 * TOLERANCE, "the weights were not used as quantised ones"
        return
    both = (int8, make_quantised(tmp_path / "dynamic", dynamic=True))
    allowed = 1.5 * max(apart(from_transformers(each, made, plans, "bfloat16")[0], truth[0]) for each in both)
    for found, known in zip(serve("bfloat16", SAME_PROCESS), truth, strict=True):
        assert apart(found, known) < allowed
    assert quantising > 3 * allowed, "the weights were not used as quantised ones"


def test_what_vllm_does_not_take_is_one_line(tmp_path: Path, need_vllm: None) -> None:
    """AWQ in float32, as `dtype: auto` makes it on a CPU: refused before a weight is loaded."""
    folder = say_quantised(make_model(tmp_path, vocab_size=385, hidden_size=128), AWQ)
    options = manifest.Teacher(model="m", backend="vllm")
    with pytest.raises(DdkError, match=r"vLLM \S+ does not take .*float32 is not supported.*awq") as refused:
        open_teacher(folder, options, backend="vllm", seq_len=40, vocab_size=385)
    assert "\n" not in refused.value.message


def test_a_teacher_in_16_bits_gives_logits_in_32(
    smollm: Path, windows: list[Window], need_vllm: None
) -> None:
    """Both engines; the hook fails a window whose logits came in 16 bits. Hidden states still are rounded: they
    agree within what that costs."""
    short = {"model": "m", "dtype": "bfloat16"}
    chosen = plan("topk")
    (theirs,) = select_elsewhere(smollm, manifest.Teacher(backend="vllm", **short), windows[:2], [chosen])
    ours = open_teacher(smollm, manifest.Teacher(**short), backend="hf", seq_len=SEQ_LEN)
    for one, other in zip(theirs, ours.select(windows[:2], chosen), strict=True):
        apart = (one.label_logprobs - other.label_logprobs).nan_to_num().abs()
        assert float(apart.mean()) < 0.05 and float(apart.max()) < 1.0
        kept = one.targets[0].logprobs[~one.label_logprobs.isnan()].double()
        # of logits in bfloat16 the differences within a row are multiples of 2^-10 or more
        steps = (kept - kept[:, :1]) * 2**10
        assert float((steps - steps.round()).abs().mean()) > 0.1

"""The transformers teacher: aligned to the token, blocks and batches without influence, honest about odd heads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from alignment import STEP, assert_aligned, prefix_logprobs
from quantised import AWQ, say_quantised
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from waits import Waits

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import head_is_plain
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected
from ddk_pipe.stages.teachers import Window, choose_backend, open_teacher
from ddk_pipe.stages.teachers.hf import Head, HfTeacher, check_placed, choose_spread

PLAN = Plan("threshold", 0.02, 8, 64, 20, (1.0,), 0)


def make_window(seed: int, length: int = 24, vocab: int = 300) -> Window:
    tokens = np.random.default_rng(seed).integers(0, vocab, length)
    labels = np.append(tokens[1:], NO_LABEL)
    labels[3] = NO_LABEL
    return Window(f"d/train/0/{seed}", tokens, labels)


def teacher(folder: Path, vocab_size: int | None = None, **options: Any) -> HfTeacher:
    return HfTeacher(folder, manifest.Teacher(model="m", backend="hf", **options), vocab_size=vocab_size)


@pytest.fixture(scope="module")
def truth(tiny_teacher: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    return prefix_logprobs(model, make_window(0).tokens.tolist())


def test_first_token_and_boundary_alignment(tiny_teacher: Path, truth: torch.Tensor) -> None:
    window = make_window(0)
    (selected,) = teacher(tiny_teacher).select([window], PLAN)
    assert_aligned(selected, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_selection_fails_that_test(tiny_teacher: Path, truth: torch.Tensor, shift: int) -> None:
    window = make_window(0)
    (selected,) = teacher(tiny_teacher).select([window], PLAN)
    rows = torch.arange(len(window.labels)).roll(shift)
    kept = selected.kept[0].rows(rows)
    shifted = Selected(selected.label_logprobs[rows], (kept,))
    with pytest.raises(AssertionError):
        assert_aligned(shifted, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)
    only_targets = Selected(selected.label_logprobs, (kept,))
    with pytest.raises(AssertionError):
        assert_aligned(only_targets, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_batches_and_blocks_do_not_change_a_window(
    tiny_teacher: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(scheme, 0.02, 8, 64, 20, (1.0, 2.0), 0)
    windows = [make_window(seed) for seed in range(5)]
    one = teacher(tiny_teacher, batch_windows=1).select(windows, plan)
    monkeypatch.setattr("ddk_pipe.stages.teachers.hf.head_rows", lambda _: 7)
    other = teacher(tiny_teacher, batch_windows=4).select(windows, plan)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a.label_logprobs, b.label_logprobs, atol=1e-4, equal_nan=True)
        for first, second in zip(a.targets, b.targets, strict=True):
            same = (first.ids == second.ids).all(1) if first.ids.shape == second.ids.shape else torch.zeros(1)
            assert (
                float(same.double().mean()) > 0.9
            )  # a batch may move a probability by an ulp, and a draw with it


def capped_model(folder: Path) -> Any:
    """A small Gemma 2, whose logits are soft-capped after the output layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        max_position_embeddings=64,
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    model.save_pretrained(folder)
    return model.float()


@pytest.mark.parametrize("in_blocks", [True, False])
def test_heads_that_soft_cap_are_noticed_and_predicted_rightly(
    tmp_path: Path, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks around a stand-in for the decoder, and from whole logits where that is refused."""
    model = capped_model(tmp_path)
    assert not head_is_plain(model)
    if not in_blocks:
        monkeypatch.setattr(Head, "_stand_in_is_right", lambda self: False)
    monkeypatch.setattr("ddk_pipe.stages.teachers.hf.head_rows", lambda _: 7)
    windows = [make_window(seed, vocab=64) for seed in (1, 2)]
    opened = teacher(tmp_path)
    assert opened.head.in_blocks == in_blocks and "forward" not in opened.model.base_model.__dict__
    for window, selected in zip(windows, opened.select(windows, PLAN), strict=True):
        truth = prefix_logprobs(model, window.tokens.tolist())
        assert_aligned(selected, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=1e-3)


def test_a_forward_that_wants_more_of_its_decoder_gets_whole_logits(tmp_path: Path) -> None:
    model = capped_model(tmp_path)

    def forward(**options: Any) -> Any:
        states = model.base_model(**options)
        return type(states)(logits=states.last_hidden_state.tanh(), past=states.no_such_thing)

    model.forward = forward
    head = Head.__new__(Head)
    head.model, head.vocab_size, head.plain = model, 64, False
    with pytest.raises(AttributeError):
        head._own_forward(torch.zeros(3, 16))
    assert "forward" not in model.base_model.__dict__


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rows of the largest tensor of a vocabulary's width that any operation makes."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] >= self.vocab_size:
            self.rows = max(self.rows, out.numel() // out.shape[-1])
        return out


@pytest.mark.parametrize("capped", [False, True])
def test_logits_exist_for_a_block_of_rows_only(
    tmp_path: Path, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 64 if capped else 96  # wider than any hidden state
    if capped:
        capped_model(tmp_path)
    else:
        make_model(tmp_path, vocab_size=vocab)
    opened = teacher(tmp_path, batch_windows=4)
    monkeypatch.setattr("ddk_pipe.stages.teachers.hf.head_rows", lambda _: 5)
    with Largest(vocab) as largest:
        opened.select([make_window(seed, vocab=64) for seed in range(4)], PLAN)
    assert largest.rows == 5


def test_the_host_waits_for_the_device_once_a_block(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddk_pipe.pipeline.targets.schemes.ASKED_FREELY", set())
    monkeypatch.setattr("ddk_pipe.stages.teachers.hf.head_rows", lambda _: 7)
    opened, windows = teacher(tiny_teacher, batch_windows=2), [make_window(seed) for seed in range(2)]
    opened.select(windows, PLAN)  # whatever a first forward pass asks
    with torch.inference_mode(), Waits() as forward:
        opened.head.states(torch.from_numpy(np.stack([window.tokens for window in windows])))
    with Waits() as waits:
        opened.select(windows, PLAN)
    assert waits.counts - forward.counts == {"tolist": 2 * 4}, "24 positions in blocks of 7"


def test_a_head_is_cut_to_the_tokenizer(tmp_path: Path) -> None:
    """One of 96 rows at 64 ids: the same as the model with its last 32 rows taken off."""
    padded = make_model(tmp_path / "padded", vocab_size=96)
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "cut")
    window = make_window(3, vocab=64)
    one, other = (
        teacher(tmp_path / name, vocab_size=64).select([window], PLAN)[0] for name in ("padded", "cut")
    )
    assert torch.allclose(one.label_logprobs, other.label_logprobs, atol=1e-5, equal_nan=True)
    assert one.targets[0].ids.equal(other.targets[0].ids)
    assert teacher(padded).vocab_size == 96 and teacher(padded, vocab_size=200).vocab_size == 96


@pytest.mark.parametrize("device", ["balanced", "sequential"])
def test_a_device_map_changes_nothing(tiny_teacher: Path, device: str) -> None:
    """Placed by accelerate, here all on the CPU; several GPUs were not at hand."""
    spread = teacher(tiny_teacher, device=device)
    assert spread.describe()["device"] == f"cpu, {device}"
    (one,), (other,) = (opened.select([make_window(0)], PLAN) for opened in (spread, teacher(tiny_teacher)))
    assert torch.equal(one.label_logprobs.nan_to_num(), other.label_logprobs.nan_to_num())
    assert one.targets[0].ids.equal(other.targets[0].ids)


def test_when_a_teacher_is_spread(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of a fake."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    assert choose_spread(tiny_teacher, "auto", gpu) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1 << 40))
    assert choose_spread(tiny_teacher, "auto", gpu) == "balanced"
    assert choose_spread(tiny_teacher, "cuda:0", gpu) is None
    assert choose_spread(tiny_teacher, "sequential", gpu) == "sequential"
    with pytest.raises(DdkError, match="does not fit the GPUs"):
        check_placed(SimpleNamespace(hf_device_map={"a": 0, "b": "cpu"}), gpu)
    check_placed(SimpleNamespace(hf_device_map={"a": 0, "b": 1}), gpu)


def test_broken_weights_name_the_window(tmp_path: Path) -> None:
    folder = make_model(tmp_path, vocab_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(DdkError, match="window d/train/0/2: the teacher's logits hold NaN"):
        teacher(folder).select([make_window(2, vocab=64)], PLAN)


def test_a_format_whose_package_is_missing_is_one_line(tmp_path: Path) -> None:
    assert importlib.util.find_spec("gptqmodel") is None, "this test needs it not to be there"
    folder = say_quantised(make_model(tmp_path, vocab_size=64), AWQ)
    with pytest.raises(DdkError, match=r"teacher.model: \S+ cannot be loaded \(.*gptqmodel") as refused:
        teacher(folder)
    assert "\n" not in refused.value.message


def test_backend_choice(monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path) -> None:
    options = manifest.Teacher(model="m")
    real = importlib.util.find_spec
    for installed, expected in ((True, "vllm"), (False, "hf")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, there=installed: there or None if name == "vllm" else real(name, *rest),
        )
        assert choose_backend(options) == expected
    assert choose_backend(manifest.Teacher(model="m", backend="hf")) == "hf"
    opened = open_teacher(tiny_teacher, manifest.Teacher(model="m"), backend="hf", seq_len=8)
    assert opened.describe()["engine"] == "transformers" and opened.vocab_size == 385
    opened.close()

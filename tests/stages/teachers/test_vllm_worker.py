"""The arithmetic of vLLM's hook, against hand-made runners; vLLM itself runs in tests/real."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from waits import Waits

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Teacher
from ddk_pipe.pipeline.manifest.fields import VllmOptions
from ddk_pipe.pipeline.targets import Plan, Selected, select_logits
from ddk_pipe.stages.teachers import check_capture, check_head
from ddk_pipe.stages.teachers.vllm.worker import (
    Collector,
    SelectionExtension,
    pack,
    unpack,
    v1_method,
    v2_method,
)

VOCAB, LENGTH = 70, 20
PLAN = Plan("pps", 0.05, 8, 64, 20, (1.0, 2.0), 0)
HEAD = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
HIDDEN = torch.randn(LENGTH, 8, generator=torch.Generator().manual_seed(1))
LABELS = np.append(np.arange(1, LENGTH), -100)
PROMPT = HIDDEN[:-1]  # of a window without its last token


def whole(key: str = "k") -> Selected:
    uniforms = torch.from_numpy(PLAN.uniforms(key, LENGTH))
    return select_logits(HIDDEN @ HEAD, torch.from_numpy(LABELS), PLAN, uniforms)


def assert_same(one: Selected, other: Selected) -> None:
    assert torch.equal(one.label_logprobs.isnan(), other.label_logprobs.isnan())
    assert torch.allclose(one.label_logprobs, other.label_logprobs, atol=1e-5, equal_nan=True)
    for a, b in zip(one.kept, other.kept, strict=True):
        assert a.targets.ids.equal(b.targets.ids)
        assert a.head.equal(b.head) and torch.allclose(a.mass, b.mass, atol=1e-6)


def collector() -> Collector:
    made = Collector(PLAN, VOCAB)
    made.expect("7", "k", LABELS.tobytes())
    return made


def logits_of(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ HEAD


def rounded_logits_of(hidden: torch.Tensor) -> torch.Tensor:
    return logits_of(hidden).bfloat16()


@pytest.mark.parametrize("cuts", [[0, 19], [0, 5, 19], [0, 1, 18, 19]])
def test_pieces_of_a_prompt_become_the_whole(cuts: list[int]) -> None:
    made = collector()
    made.rows = 3
    for start, end in itertools.pairwise(cuts):
        made.add("7-0123abcd", start, HIDDEN[start:end], logits_of)
    assert_same(unpack(made.take()["done"]["7"]), whole())
    assert made.take() == {"done": {}, "failed": {}}


@pytest.mark.parametrize("scheme", ["random", "threshold", "topk"])
def test_the_row_without_a_token_is_as_that_of_a_whole_window(scheme: str) -> None:
    """Not in the prompt, and without a label: byte for byte what any other position without a label gets."""
    plan = Plan(scheme, 0.05, 8, 6, 20, (1.0, 2.0), 0)
    made = Collector(plan, VOCAB)
    made.expect("7", "k", LABELS.tobytes())
    logits = HIDDEN @ HEAD
    made.add("7-0123abcd", 0, PROMPT, lambda hidden: logits[: len(hidden)])
    found = unpack(made.take()["done"]["7"])
    uniforms = torch.from_numpy(plan.uniforms("k", LENGTH))
    expected = select_logits(logits, torch.from_numpy(LABELS), plan, uniforms)
    assert pack(found) == pack(expected)


def test_a_preempted_prompt_starts_again() -> None:
    made = collector()
    made.add("7-0123abcd", 0, HIDDEN[:8], logits_of)
    made.add("7-0123abcd", 0, HIDDEN[:12], logits_of)
    made.add("7-0123abcd", 12, PROMPT[12:], logits_of)
    assert_same(unpack(made.take()["done"]["7"]), whole())


def test_positions_that_were_never_computed_are_an_error() -> None:
    made = collector()
    made.add("7-0123abcd", 4, PROMPT[4:], logits_of)
    assert "positions 0 to 4 were never computed" in made.take()["failed"]["7"]


def test_a_rank_without_logits_still_takes_part_in_every_gather() -> None:
    made, calls = collector(), []
    made.rows = 5
    made.add("7-0123abcd", 0, PROMPT, lambda hidden: calls.append(len(hidden)))
    assert calls == [5, 5, 5, 4]
    assert made.take() == {"done": {}, "failed": {}}


def test_the_worker_waits_for_its_device_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_pipe.pipeline.targets.schemes.ASKED_FREELY", set())
    made = collector()
    made.rows = 5
    with Waits() as waits:
        made.add("7-0123abcd", 0, PROMPT, logits_of)
    assert waits.counts == {"tolist": 4}, "19 positions in blocks of 5"
    assert_same(unpack(made.take()["done"]["7"]), whole())


def test_nan_logits_fail_their_request() -> None:
    made = collector()
    made.add("7-0123abcd", 0, HIDDEN, lambda hidden: hidden @ HEAD * float("nan"))
    assert "NaN" in made.take()["failed"]["7"]


def test_logits_that_are_rounded_against_the_manifest_fail_their_request() -> None:
    """A vLLM that knows no head_dtype takes the override without a word."""
    made = Collector(PLAN, VOCAB, wide=True)
    for request, rounded in (("7", True), ("8", False)):
        made.expect(request, "k", LABELS.tobytes())
        made.add(f"{request}-0123abcd", 0, PROMPT, rounded_logits_of if rounded else logits_of)
    taken = made.take()
    assert list(taken["done"]) == ["8"]
    assert taken["failed"] == {"7": "teacher.logits: float32, and this vLLM rounds them, in bfloat16"}


def test_requests_of_vllms_own_are_left_alone() -> None:
    made = collector()
    made.add("warm-up-1", 0, HIDDEN, logits_of)
    assert made.take() == {"done": {}, "failed": {}}


class FakeV1:
    """What the V1 runner offers: two requests in one batch of hidden states."""

    def __init__(self) -> None:
        self.num_prompt_logprobs = {"7-0123abcd": 0}
        self.requests = {
            "7-0123abcd": SimpleNamespace(prompt_token_ids=[0] * len(PROMPT), num_computed_tokens=0)
        }
        self.query_start_loc = SimpleNamespace(np=np.array([0, 4, 4 + len(PROMPT)]))
        self.input_batch = SimpleNamespace(req_id_to_index={"other-1": 0, "7-0123abcd": 1})
        self.model = SimpleNamespace(compute_logits=logits_of)

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> None: ...


def test_v1_method_finds_its_rows() -> None:
    runner, made = FakeV1(), collector()
    hidden = torch.cat([torch.full((4, 8), 99.0), PROMPT])
    assert v1_method(made)(runner, hidden, {"7-0123abcd": len(PROMPT)}) == {}
    assert_same(unpack(made.take()["done"]["7"]), whole())
    assert not runner.num_prompt_logprobs
    v1_method(made)(runner, hidden, {})  # nothing scheduled


def fake_v2(start: int, rows: int) -> tuple[Any, dict[str, Any]]:
    batch = SimpleNamespace(
        req_ids=["other-1", "7-0123abcd"],
        idx_mapping_np=np.array([3, 1]),
        num_computed_prefill_tokens_np=np.array([0, start]),
        prefill_len_np=np.array([4, len(PROMPT)]),
        num_scheduled_tokens=np.array([4, rows]),
        query_start_loc_np=np.array([0, 4, 4 + rows]),
    )
    worker = SimpleNamespace(uses_prompt_logprobs=np.array([False, True, False, False]))
    return worker, {
        "logits_fn": logits_of,
        "hidden_states": torch.cat([torch.full((4, 8), 99.0), PROMPT[start : start + rows]]),
        "input_batch": batch,
        "all_token_ids": None,
        "num_computed_tokens": None,
        "prompt_lens": np.array([0, len(PROMPT), 0, 4]),
    }


def test_v2_method_finds_its_rows_on_fakes() -> None:
    """V2 needs Triton, so it never ran on this CPU: this checks our row arithmetic only."""
    made = collector()
    for start, rows in ((0, 12), (12, 7)):
        worker, arguments = fake_v2(start, rows)
        assert v2_method(made)(worker, **arguments) == {}
    assert_same(unpack(made.take()["done"]["7"]), whole())


def test_unknown_runners_and_signatures_are_refused() -> None:
    extension = SelectionExtension()
    extension.model_runner = FakeV1()
    assert extension.ddk_install(PLAN.to_dict(), VOCAB) == "v1"
    extension.model_runner = SimpleNamespace()
    assert "neither the V1 nor the V2" in extension.ddk_install(PLAN.to_dict(), VOCAB)
    extension.model_runner = SimpleNamespace(_get_prompt_logprobs_dict=lambda hidden_states, more: None)
    assert "takes ['hidden_states', 'more']" in extension.ddk_install(PLAN.to_dict(), VOCAB)


def test_pack_crosses_processes_as_bytes() -> None:
    import json

    packed = pack(whole())
    json.dumps([[shape, dtype, len(content)] for shape, dtype, content in packed])
    assert_same(unpack(packed), whole())


@pytest.mark.parametrize(
    ("scheme", "temperatures", "expected"),
    [
        ("pps", (1.0,), "pps needs the whole distribution"),
        ("random", (1.0,), "random needs the whole distribution"),
        ("topk", (1.0, 2.0), "T = 1 only"),
    ],
)
def test_plain_prompt_logprobs_says_what_it_cannot_do(scheme: str, temperatures: Any, expected: str) -> None:
    options = Teacher(model="m", vllm=VllmOptions(capture="prompt_logprobs"))
    with pytest.raises(DdkError, match=expected):
        check_capture(options, Plan(scheme, 0.02, 8, 64, 20, temperatures, 0))
    check_capture(options, Plan("topk", 0.02, 8, 64, 20, (1.0,), 0))


def test_the_padding_of_a_head_is_cut_before_the_softmax() -> None:
    """The hook sees the rows of the output layer beyond the tokenizer's ids, here large ones."""
    made = collector()
    padding = torch.full((len(PROMPT), 6), 50.0)
    made.add(
        "7-0123abcd", 0, PROMPT, lambda hidden: torch.cat([hidden @ HEAD, padding[: len(hidden)]], dim=1)
    )
    assert_same(unpack(made.take()["done"]["7"]), whole())


def test_plain_prompt_logprobs_cannot_be_cut() -> None:
    public = Teacher(model="m", vllm=VllmOptions(capture="prompt_logprobs"))
    with pytest.raises(DdkError, match="predicts 152,064 tokens, the tokenizer has 151,936"):
        check_head(public, 152_064, 151_936)
    check_head(public, 151_936, 151_936)
    check_head(Teacher(model="m"), 152_064, 151_936)

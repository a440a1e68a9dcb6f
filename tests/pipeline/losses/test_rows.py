"""Rows checked on the host once: the same loss and measures as from labels and targets, and what moves with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import NEG_INF, linear, make_case

from ddk_pipe.pipeline.losses import labelled_rows, measure, measure_rows, rows_sparse_kd, target_entropy
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


def rows_of(case: Any, **options: Any) -> Any:
    return labelled_rows(case.labels, case.targets, **{"vocab": 97, "gamma": 1.0} | options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_of_rows_is_that_of_labels_and_targets(dtype: torch.dtype) -> None:
    case = make_case("topk")
    want, gradients = linear(case, dtype, gamma=0.7, temperature=2.0)
    inputs = [x.to(dtype).clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    rows = rows_of(case, dtype=dtype)
    got = rows_sparse_kd(inputs[0], inputs[1], rows, gamma=0.7, temperature=2.0, bias=inputs[2])
    assert torch.equal(got.total, want.total)
    assert got.positions == want.positions == len(rows)
    for mine, other in zip(torch.autograd.grad(got.total, inputs), gradients, strict=True):
        assert torch.equal(mine.double(), other.double())


def test_measures_of_rows_are_those_of_labels_and_targets() -> None:
    case = make_case("topk")
    given = (case.hidden.float(), case.weight.float())
    want = measure(*given, case.labels, case.targets, temperature=2.0)
    assert torch.equal(measure_rows(*given, rows_of(case), temperature=2.0), want)


def test_rows_hold_the_labelled_positions_and_weights_without_padding() -> None:
    ids = torch.tensor([[1, 2], [3, -1], [-1, -1], [0, 4]])
    targets = SparseTargets(ids, torch.full((4, 2), -1.0), torch.tensor([-2.0, NEG_INF, NEG_INF, -3.0]))
    rows = labelled_rows(torch.tensor([5, NO_LABEL, 0, 4]), targets, vocab=6, gamma=1.0)
    assert (rows.positions, len(rows)) == (4, 3)
    assert rows.live.tolist() == [0, 2, 3]
    assert rows.labels.tolist() == [5, 0, 4]
    assert rows.ids.dtype == torch.int32
    assert rows.ids.tolist() == [[1, 2], [-1, -1], [0, 4]]
    assert rows.log_weights.tolist() == [[-1, -1, -2], [NEG_INF] * 3, [-1, -1, -3]]
    assert rows.rows(slice(1, 3)).labels.tolist() == [0, 4]
    moved = rows.to("meta")
    assert {x.device.type for x in (moved.live, moved.labels, moved.ids, moved.log_weights)} == {"meta"}


def test_ids_too_large_for_int32_are_refused_before_they_are_narrowed() -> None:
    targets = SparseTargets(torch.tensor([[2**32 + 1]]), torch.zeros(1, 1), torch.tensor([NEG_INF]))
    with pytest.raises(ValueError, match=r"position 0 has id 4294967297, outside"):
        labelled_rows(torch.tensor([1]), targets, vocab=97, gamma=1.0)


def test_entropy_of_rows_is_that_of_their_targets() -> None:
    case = make_case("threshold")
    live = case.targets.rows(case.labels != NO_LABEL)
    assert float(rows_of(case).entropy()) == pytest.approx(target_entropy(live), rel=1e-12)


def test_rows_that_do_not_fit_are_refused() -> None:
    case = make_case("topk")
    rows = rows_of(case)
    hidden, weight = case.hidden.float(), case.weight.float()
    with pytest.raises(ValueError, match=r"hidden has shape \[22, 13\]: expected \[23, d\]"):
        rows_sparse_kd(hidden[:22], weight, rows, gamma=1.0)
    with pytest.raises(ValueError, match=r"hidden has shape \[22, 13\]: expected \[23, d\]"):
        measure_rows(hidden[:22], weight, rows)
    with pytest.raises(ValueError, match=r"rows on meta, hidden on cpu"):
        rows_sparse_kd(hidden, weight, rows.to("meta"), gamma=1.0)
    with pytest.raises(ValueError, match=r"weights in torch.float32: expected torch.float64"):
        rows_sparse_kd(case.hidden, case.weight, rows, gamma=1.0)
    with pytest.raises(ValueError, match=r"labels are torch.float32"):
        labelled_rows(case.labels.float(), case.targets, vocab=97, gamma=1.0)

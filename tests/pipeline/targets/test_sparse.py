import pytest
import torch

from ddk_pipe.pipeline.targets import SparseTargets, stack

NONE = float("-inf")


def targets(ids: list[list[int]], weights: list[list[float]], tail: list[float]) -> SparseTargets:
    return SparseTargets(
        ids=torch.tensor(ids, dtype=torch.int32),
        logprobs=torch.tensor(weights).log(),
        tail=torch.tensor(tail).log(),
    )


def test_a_valid_value_passes() -> None:
    targets([[1, 5], [3, -1], [-1, -1]], [[0.5, 0.25], [1.0, 0.0], [0.0, 0.0]], [0.25, 0.0, 0.0]).validate(6)


@pytest.mark.parametrize(
    ("ids", "weights", "tail", "what"),
    [
        ([[2, 2]], [[0.5, 0.5]], [0.0], "duplicate id"),
        ([[3, 2]], [[0.5, 0.5]], [0.0], "do not ascend"),
        ([[-1, 2]], [[0.0, 1.0]], [0.0], "padding before an id"),
        ([[1, -1]], [[0.5, 0.5]], [0.0], "padding whose log-weight"),
        ([[1, 2]], [[0.5, 0.2]], [0.0], "do not sum to 1"),
        ([[1, 9]], [[0.5, 0.5]], [0.0], "outside the vocabulary"),
        ([[-2, 1]], [[0.5, 0.5]], [0.0], "below -1"),
    ],
)
def test_each_broken_invariant_is_named(
    ids: list[list[int]], weights: list[list[float]], tail: list[float], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        targets(ids, weights, tail).validate(6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    broken = SparseTargets(ids=torch.zeros(2, 3).int(), logprobs=torch.zeros(2, 2), tail=torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 2\)"):
        broken.validate()


def test_stack_pads_to_the_widest_and_keeps_the_order() -> None:
    narrow = targets([[4]], [[1.0]], [0.0])
    wide = targets([[0, 1, 2]], [[0.5, 0.25, 0.25]], [0.0])
    both = stack([narrow, wide])
    both.validate(5)
    assert both.ids.tolist() == [[4, -1, -1], [0, 1, 2]]
    assert both.rows(slice(1, 2)).logprobs.equal(wide.logprobs)


def test_renormalised_scales_the_head_and_throws_the_tail_away() -> None:
    rows = targets([[1, 5], [3, -1], [-1, -1]], [[0.5, 0.25], [0.2, 0.0], [0.0, 0.0]], [0.25, 0.8, 1.0])
    found = rows.renormalised()
    found.validate(6)
    assert found.ids.equal(rows.ids)
    torch.testing.assert_close(found.logprobs.exp(), torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0], [0.0, 0.0]]))
    assert found.tail.tolist() == [NONE] * 3
    assert targets([[]], [[]], [1.0]).renormalised().positions == 1

"""The data order: exact shares, no repeats in an epoch, resumable, the same for any world size."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing import DomainSampler, rank_slice
from ddk_pipe.pipeline.mixing import sampler as sampler_module

Order = NDArray[np.int64]
PATIENT = settings(deadline=None)  # a busy host is no failure
seeds = st.integers(0, 2**70)
counts_per_domain = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@st.composite
def weights_of(draw: st.DrawFn, domains: int) -> NDArray[np.float64]:
    raw = draw(st.lists(st.floats(0.0, 1.0), min_size=domains, max_size=domains))
    raw[draw(st.integers(0, domains - 1))] = 1.0
    weights: NDArray[np.float64] = np.array(raw) / np.sum(raw)
    return weights


def drawn(order: Order, domains: int) -> NDArray[np.int64]:
    """Windows drawn from each domain, [domains]."""
    return np.bincount(order[:, 0], minlength=domains)


def history(sampler: DomainSampler, data: st.DataObject, *, domains: int, intervals: int) -> Iterator[Order]:
    """Intervals of random weights and lengths."""
    for _ in range(intervals):
        yield sampler.draw_interval(data.draw(weights_of(domains)), data.draw(st.integers(1, 60)))


@PATIENT
@given(counts_per_domain, seeds, st.data())
def test_realised_shares_are_within_one_window(
    window_counts: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(weights_of(len(window_counts)))
    windows = data.draw(st.integers(1, 500))
    order = DomainSampler(window_counts, seed=seed).draw_interval(weights, windows)
    assert order.shape == (windows, 2) and order.dtype == np.int64
    counts = drawn(order, len(window_counts))
    assert np.abs(counts - weights * windows).max() < 1 + 1e-9
    assert not counts[weights == 0].any()
    assert (order[:, 1] >= 0).all() and (order[:, 1] < np.array(window_counts)[order[:, 0]]).all()


@PATIENT
@given(counts_per_domain, seeds, st.data())
def test_no_window_comes_twice_before_its_domain_is_through(
    window_counts: list[int], seed: int, data: st.DataObject
) -> None:
    sampler = DomainSampler(window_counts, seed=seed)
    orders = list(history(sampler, data, domains=len(window_counts), intervals=4))
    for domain, size in enumerate(window_counts):
        seen = np.zeros(size, dtype=np.int64)
        for order in orders:
            seen += np.bincount(order[order[:, 0] == domain, 1], minlength=size)
            assert seen.max() - seen.min() <= 1
        assert seen.sum() == sampler.state_dict()["cursors"][domain]


@PATIENT
@given(counts_per_domain, seeds, st.data())
def test_resuming_from_json_continues_exactly(
    window_counts: list[int], seed: int, data: st.DataObject
) -> None:
    sampler = DomainSampler(window_counts, seed=seed)
    for _ in history(sampler, data, domains=len(window_counts), intervals=2):
        pass
    resumed = DomainSampler(window_counts, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for _ in range(2):
        weights = data.draw(weights_of(len(window_counts)))
        windows = data.draw(st.integers(1, 60))
        np.testing.assert_array_equal(
            resumed.draw_interval(weights, windows), sampler.draw_interval(weights, windows)
        )
    assert resumed.state_dict() == sampler.state_dict()


@PATIENT
@given(counts_per_domain, seeds, st.data())
def test_loading_a_state_goes_back_as_well_as_forward(
    window_counts: list[int], seed: int, data: st.DataObject
) -> None:
    sampler = DomainSampler(window_counts, seed=seed)
    start = sampler.state_dict()
    weights = data.draw(weights_of(len(window_counts)))
    first = sampler.draw_interval(weights, 50)
    sampler.load_state_dict(start)
    np.testing.assert_array_equal(sampler.draw_interval(weights, 50), first)
    assert start["interval"] == 0  # and drawing did not write into the state handed out


@PATIENT
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 5), seeds)
def test_ranks_recombine_to_the_same_steps_for_any_world_size(world_size: int, steps: int, seed: int) -> None:
    batch = 12
    weights = np.array([0.5, 0.2, 0.3])
    whole = DomainSampler([30, 5, 9], seed=seed).draw_interval(weights, steps * batch)
    ranks = [DomainSampler([30, 5, 9], seed=seed) for _ in range(world_size)]
    own = [sampler.draw_interval(weights, steps * batch) for sampler in ranks]
    for first in range(0, steps * batch, batch):
        rejoined = np.empty((batch, 2), dtype=np.int64)
        for rank, order in enumerate(own):
            part = rank_slice(order[first : first + batch], rank=rank, world_size=world_size)
            assert len(part) == batch // world_size
            rejoined[rank::world_size] = part
        np.testing.assert_array_equal(rejoined, whole[first : first + batch])


def test_same_seed_same_order_and_another_seed_another() -> None:
    weights = np.array([0.5, 0.5])
    orders = [DomainSampler([100, 100], seed=s).draw_interval(weights, 100) for s in (1, 1, 2)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    windows = [set(map(tuple, order.tolist())) for order in orders]
    assert windows[0] != windows[2]  # other windows, not only another shuffle of the same


def test_seeds_do_not_run_into_the_words_of_the_key() -> None:
    orders = [
        DomainSampler([100], seed=seed).draw_interval(np.ones(1), 100).tobytes()
        for seed in (5, 5 + 2**32, 5 + 2**64, 5 + 2**128, 5 + 2**32 + 2**64)
    ]
    assert len(set(orders)) == len(orders)


def test_the_order_is_pinned_across_numpy_versions() -> None:
    """A change here breaks every checkpoint in the world: the windows left would be dealt anew."""
    sampler = DomainSampler([4, 6], seed=7)
    orders = [sampler.draw_interval(np.array([0.25, 0.75]), 6).tolist() for _ in range(2)]
    assert orders == [
        [[1, 3], [1, 2], [0, 0], [1, 1], [1, 5], [0, 3]],
        [[1, 2], [1, 0], [1, 4], [1, 5], [0, 1], [0, 2]],
    ]


def test_global_random_state_is_neither_read_nor_moved() -> None:
    sampler = DomainSampler([9], seed=0)
    np.random.seed(1)
    before = np.random.get_state(legacy=False)
    first = sampler.draw_interval(np.ones(1), 9)
    after = np.random.get_state(legacy=False)
    assert str(before) == str(after)
    np.random.seed(2)
    np.testing.assert_array_equal(DomainSampler([9], seed=0).draw_interval(np.ones(1), 9), first)


def test_other_domains_do_not_change_a_domains_own_order() -> None:
    """What a domain deals depends on how much it dealt, not on when or beside whom."""
    together, alone = DomainSampler([50, 50], seed=3), DomainSampler([50, 50], seed=3)
    for weights in (np.array([0.2, 0.8]), np.array([0.9, 0.1]), np.array([0.4, 0.6])):
        together.draw_interval(weights, 20)
    dealt = together.state_dict()["cursors"][0]
    assert dealt < 50
    alone.draw_interval(np.array([1.0, 0.0]), dealt)
    rest = [s.draw_interval(np.array([1.0, 0.0]), 50 - dealt) for s in (together, alone)]
    assert set(rest[0][:, 1]) == set(rest[1][:, 1])


def test_epochs_intervals_and_domains_are_shuffled_differently() -> None:
    sampler = DomainSampler([200, 200], seed=11)
    orders = [sampler.draw_interval(np.array([0.5, 0.5]), 100) for _ in range(8)]
    halves = [set(map(int, order[order[:, 0] == 0, 1])) for order in orders]
    assert set.union(*halves[:4]) == set(range(200)) == set.union(*halves[4:])
    assert halves[0] != halves[4]  # the second epoch deals in another order
    assert halves[0] != set(map(int, orders[0][orders[0][:, 0] == 1, 1]))
    assert (orders[0][:, 0] != orders[1][:, 0]).any()  # each interval has its own shuffle


def test_one_interval_may_span_several_epochs() -> None:
    order = DomainSampler([3, 1], seed=5).draw_interval(np.array([0.5, 0.5]), 20)
    seen = np.bincount(order[order[:, 0] == 0, 1], minlength=3)
    assert sorted(seen.tolist()) == [3, 3, 4]
    assert drawn(order, 2).tolist() == [10, 10]


def test_fractional_shares_are_unbiased() -> None:
    """Mean counts over many intervals; a biased rounding would be off by up to 0.5."""
    weights = np.array([0.03, 0.07, 0.115, 0.235, 0.55])
    intervals, windows = 4000, 7
    sampler = DomainSampler([1000] * 5, seed=1)
    counts = [drawn(sampler.draw_interval(weights, windows), 5) for _ in range(intervals)]
    five_standard_errors = 5 * 0.5 / np.sqrt(intervals)
    np.testing.assert_allclose(np.mean(counts, axis=0), weights * windows, rtol=0, atol=five_standard_errors)
    assert np.abs(counts - weights * windows).max() < 1 + 1e-9


def test_every_position_of_the_interval_sees_every_domain() -> None:
    """The shuffle leaves no domain at the front: a step is a fair sample of its interval."""
    sampler = DomainSampler([500, 500], seed=2)
    first = [sampler.draw_interval(np.array([0.5, 0.5]), 10)[:, 0] for _ in range(2000)]
    np.testing.assert_allclose(np.mean(first, axis=0), 0.5, rtol=0, atol=5 * 0.5 / np.sqrt(2000))


def test_every_window_is_as_likely_to_come_first() -> None:
    firsts = [DomainSampler([4], seed=s).draw_interval(np.ones(1), 1)[0, 1] for s in range(2000)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=4) / 2000, 0.25, atol=0.05)


@pytest.mark.parametrize(
    ("weights", "windows", "message"),
    [
        ([0.5, 0.25, 0.25], 4, "domain 2 has weight 0.25 but no windows"),
        ([0.5, 0.5], 4, "weights has 2 domains, expected 3"),
        ([0.5, 0.6, -0.1], 4, "weights of domain 2 is -0.1, below 0"),
        ([0.5, float("nan"), 0.0], 4, "weights of domain 1 is nan"),
        ([0.5, 0.4, 0.0], 4, "weights must sum to 1, got 0.9"),
        ([0.5, 0.5, 0.0], 0, "windows must be at least 1, got 0"),
    ],
)
def test_a_refused_interval_moves_nothing(weights: list[float], windows: int, message: str) -> None:
    sampler = DomainSampler([5, 5, 0], seed=0)
    with pytest.raises(ValueError, match=message):
        sampler.draw_interval(np.array(weights), windows)
    assert sampler.state_dict() == DomainSampler([5, 5, 0], seed=0).state_dict()


def test_an_empty_domain_without_weight_is_fine() -> None:
    order = DomainSampler([5, 0, 5, 0], seed=0).draw_interval(np.array([0.5, 0, 0.5, 0]), 8)
    assert drawn(order, 4).tolist() == [4, 0, 4, 0]


@pytest.mark.parametrize("offset", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("last_weight", [0.0, 1e-20])
def test_rounding_neither_loses_a_window_nor_gives_it_to_a_domain_of_weight_0(
    offset: float, last_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/10 added ten times is below 1, 1/9 nine times above: at extreme offsets that would show."""
    monkeypatch.setattr(sampler_module, "_unit_interval", lambda stream: offset)
    for domains in range(1, 60):
        weights = np.append(np.full(domains, 1 / domains), last_weight)
        order = DomainSampler([10] * (domains + 1), seed=0).draw_interval(weights, 3 * domains)
        counts = drawn(order, domains + 1)
        assert len(order) == 3 * domains and counts[-1] <= (last_weight > 0)
        assert counts[:-1].min() >= 2 and counts[:-1].max() <= 4


def test_senseless_construction_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        DomainSampler([1], seed=-1)
    for window_counts in ([], [3, -1]):
        with pytest.raises(ValueError, match="window_counts must be at least 0 each"):
            DomainSampler(window_counts, seed=0)


def test_a_state_of_another_run_is_refused() -> None:
    state = DomainSampler([5, 6], seed=1).state_dict()
    with pytest.raises(DdkError, match="has seed 1, this run has 2; resume with the manifest"):
        DomainSampler([5, 6], seed=2).load_state_dict(state)
    with pytest.raises(DdkError, match=r"has window_counts \[5, 6\], this run has \[5, 7\]"):
        DomainSampler([5, 7], seed=1).load_state_dict(state)


def test_a_malformed_state_is_refused() -> None:
    sampler = DomainSampler([5, 6], seed=1)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match="has no 'cursors', only"):
        sampler.load_state_dict({k: v for k, v in state.items() if k != "cursors"})
    with pytest.raises(ValueError, match="has 1 cursors for 2 domains"):
        sampler.load_state_dict({**state, "cursors": [3]})
    with pytest.raises(ValueError, match="counts below 0"):
        sampler.load_state_dict({**state, "interval": -1})
    assert sampler.state_dict() == state


def test_a_rank_outside_the_world_or_an_uneven_batch_is_refused() -> None:
    step = np.zeros((12, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="rank must be between 0 and 3, got 4"):
        rank_slice(step, rank=4, world_size=4)
    with pytest.raises(ValueError, match="12 windows a step do not divide among 5 ranks"):
        rank_slice(step, rank=0, world_size=5)


def test_repeated_epochs_have_the_order_of_the_first() -> None:
    """One window an interval, so that the shuffle of an interval hides nothing."""
    for reshuffle in (False, True):
        sampler = DomainSampler([30], seed=3, reshuffle=reshuffle)
        dealt = [int(sampler.draw_interval(np.ones(1), 1)[0, 1]) for _ in range(60)]
        assert sorted(dealt[:30]) == sorted(dealt[30:]) == list(range(30))
        assert (dealt[:30] == dealt[30:]) is not reshuffle

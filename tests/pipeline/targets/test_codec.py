import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import (
    LOG_STEPS,
    Codec,
    Context,
    Plan,
    Planes,
    Ranks,
    Selected,
    SparseTargets,
    encode_log,
    select_logits,
)

SCHEMES = ("pps", "threshold", "topk", "random")


def plan(scheme: str, tau: float = 0.02, k: int = 8, cap: int = 50) -> Plan:
    return Plan(scheme, tau, k, cap, 50, (1.0,), 0)


def window(
    scheme: Plan, vocab: int, positions: int, seed: int, scale: float = 3.0
) -> tuple[SparseTargets, Context]:
    """Targets of random logits, and the context they are encoded in; some positions have no label."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, vocab, generator=generator) * scale
    # a likely token is the label in half of the rows
    labels = torch.randint(-1, vocab, (positions,), generator=generator)
    labels = torch.where(torch.rand(positions, generator=generator) < 0.5, logits.argmax(1), labels)
    uniforms = torch.from_numpy(scheme.uniforms(f"w{seed}", positions))
    selected = select_logits(logits, labels, scheme, uniforms)
    return selected.targets[0], context_of(selected, labels, f"w{seed}")


def context_of(selected: Selected, labels: torch.Tensor, key: str) -> Context:
    codes = encode_log(selected.label_logprobs.numpy())
    return Context(torch.where(labels < 0, -100, labels).numpy(), codes, key)


def ranks(vocab: int, seed: int = 0) -> Ranks:
    return Ranks.fit(np.random.default_rng(seed).integers(0, 1000, vocab))


def weights_of(targets: SparseTargets, row: int) -> dict[int, float]:
    pairs = zip(targets.ids[row].tolist(), targets.logprobs[row].double().exp().tolist(), strict=True)
    return {token: weight for token, weight in pairs if token >= 0}


@given(
    scheme=st.sampled_from(SCHEMES),
    vocab=st.sampled_from([2, 37, 1000, 70_000, 300_000]),
    positions=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    temperature=st.sampled_from([1.0, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_round_trip_keeps_ids_and_bounds_the_weights(
    scheme: str, vocab: int, positions: int, seed: int, scale: float, temperature: float
) -> None:
    chosen = plan(scheme)
    codec = Codec(chosen, ranks(vocab), temperature)  # at another temperature no label is implied
    before, context = window(chosen, vocab, positions, seed, scale)
    after = codec.decode(codec.encode(before, context), context)
    after.validate(vocab)
    for row in range(positions):
        old, new = weights_of(before, row), weights_of(after, row)
        assert set(new) == set(old)
        slack = sum(codec.cell(weight) for weight in old.values()) + 1e-3
        assert all(abs(new[token] - old[token]) <= slack for token in new)
    if chosen.has_tail:
        finite = before.tail > -31  # the code allows half a step, and decoding may use all of it
        assert torch.allclose(before.tail[finite], after.tail[finite], atol=1 / LOG_STEPS + 1e-5)


def test_random_counts_are_exact() -> None:
    chosen = plan("random")
    codec = Codec(chosen, ranks(200))
    before, context = window(chosen, 200, 12, 1)
    after = codec.decode(codec.encode(before, context), context)
    assert after.ids.equal(before.ids) and torch.allclose(after.logprobs, before.logprobs, atol=1e-6)
    assert codec.cell(0.3) == 0.0


@pytest.mark.parametrize("shape", ["peaked", "flat", "two", "one", "random"])
def test_decoded_pps_is_unbiased(shape: str) -> None:
    """Over 1,000 windows with draws and rounding of their own: each mean weight within 5 standard errors of p,
    plus what the label's own code may be off (1/4096 of it)."""
    vocab, runs = 400, 1000
    logits = {
        "peaked": torch.linspace(6, -6, vocab),
        "flat": torch.zeros(vocab),
        "two": torch.full((vocab,), -40.0).index_fill(0, torch.tensor([3, 300]), 0.0),
        "one": torch.full((vocab,), -60.0).index_fill(0, torch.tensor([7]), 0.0),
        "random": torch.randn(vocab, generator=torch.Generator().manual_seed(9)) * 2.5,
    }[shape]
    p = torch.softmax(logits.double(), 0)
    chosen = plan("pps")
    codec = Codec(chosen, ranks(vocab))
    labels = torch.full((runs,), int(p.argmax()))
    uniforms = torch.from_numpy(chosen.uniforms("unbiased", runs))
    selected = select_logits(logits.expand(runs, -1), labels, chosen, uniforms)
    context = context_of(selected, labels, "unbiased")
    decoded = codec.decode(codec.encode(selected.targets[0], context), context)
    weights = torch.zeros(runs, vocab + 1).double()
    weights.scatter_(1, decoded.ids.long() % (vocab + 1), decoded.logprobs.double().exp())
    weights = weights[:, :vocab]
    error = weights.std(0) / runs**0.5
    allowed = 5 * error + p.max() / 4096 + 1e-6
    # a token so rare that it was never drawn has no error to estimate: its mean is 0 and p is the whole deviation
    allowed += torch.where(error == 0, 5 * (p * chosen.tau / runs).sqrt(), 0.0)
    assert bool(((weights.mean(0) - p).abs() <= allowed).all())


def test_positions_without_a_label_cost_nothing() -> None:
    chosen = plan("pps")
    codec = Codec(chosen, ranks(100))
    targets, _ = window(chosen, 100, 6, 0)
    nothing = SparseTargets(
        ids=torch.full_like(targets.ids, -1),
        logprobs=torch.full_like(targets.logprobs, float("-inf")),
        tail=targets.tail,
    )
    planes = codec.encode(nothing, Context.none(6))
    assert all(len(planes[name]) == 0 for name in ("octaves", "bits", "codes"))
    assert not planes["heads"].any() and not planes["draws"].any()
    assert codec.decode(planes, Context.none(6)).ids.shape == (6, 0)


def test_an_implied_label_costs_nothing_and_keeps_its_precise_weight() -> None:
    chosen = plan("pps")
    codec = Codec(chosen, ranks(50))
    logits = torch.full((1, 50), -10.0)
    logits[0, 4] = 2.0
    labels = torch.tensor([4])
    selected = select_logits(logits, labels, chosen, torch.full((1, 1, 1), 0.5, dtype=torch.float64))
    context = context_of(selected, labels, "w")
    planes = codec.encode(selected.targets[0], context)
    assert planes["heads"].tolist() == [0] and len(planes["codes"]) == 0
    decoded = weights_of(codec.decode(planes, context), 0)
    assert decoded[4] == pytest.approx(float(torch.softmax(logits, 1)[0, 4]), rel=1 / 4096)


def test_targets_without_the_label_that_must_be_there_are_refused() -> None:
    targets = SparseTargets(
        ids=torch.tensor([[5]], dtype=torch.int32),
        logprobs=torch.tensor([[0.0]]),
        tail=torch.tensor([float("-inf")]),
    )
    context = Context(np.array([3]), encode_log(np.array([-0.1])), "w")
    with pytest.raises(ValueError, match="label"):
        Codec(plan("pps"), ranks(10)).encode(targets, context)


def test_first_and_last_id_survive() -> None:
    codec = Codec(plan("topk"), Ranks.of(np.arange(100, dtype=np.int32)[::-1].copy()))
    targets = SparseTargets(
        ids=torch.tensor([[0, 99]], dtype=torch.int32),
        logprobs=torch.tensor([[0.25, 0.5]]).log(),
        tail=torch.tensor([0.25]).log(),
    )
    assert codec.decode(codec.encode(targets, Context.none(1)), Context.none(1)).ids.tolist() == [[0, 99]]


def test_duplicate_ids_are_refused() -> None:
    targets = SparseTargets(
        ids=torch.tensor([[5, 5]], dtype=torch.int32),
        logprobs=torch.tensor([[0.5, 0.5]]).log(),
        tail=torch.tensor([float("-inf")]),
    )
    with pytest.raises(ValueError, match="duplicate id"):
        Codec(plan("pps"), ranks(10)).encode(targets, Context.none(1))


@given(
    scheme=st.sampled_from(SCHEMES),
    plane=st.sampled_from(["heads", "draws", "octaves", "bits", "codes", "tails"]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_damaged_planes_give_an_error_or_valid_targets(scheme: str, plane: str, seed: int) -> None:
    """Never a crash of another kind, an id outside the vocabulary or much memory."""
    codec = Codec(plan(scheme), ranks(500))
    targets, context = window(plan(scheme), 500, 4, seed % 7)
    planes: Planes = dict(codec.encode(targets, context))
    if plane not in planes or not len(planes[plane]):
        return
    random = np.random.default_rng(seed)
    values = planes[plane].copy()
    values[random.integers(len(values))] = random.integers(np.iinfo(values.dtype).max + 1)
    planes[plane] = values
    try:
        decoded = codec.decode(planes, context)
    except ValueError:
        return
    decoded.validate(500)


@pytest.mark.parametrize("plane", ["octaves", "bits", "codes"])
def test_short_planes_are_refused(plane: str) -> None:
    codec = Codec(plan("topk"), ranks(50))
    targets, context = window(plan("topk"), 50, 4, 0)
    planes = codec.encode(targets, context)
    planes[plane] = planes[plane][:-1]
    with pytest.raises(ValueError, match="too short"):
        codec.decode(planes, context)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_planes_are_as_announced_and_may_be_padded(scheme: str) -> None:
    codec = Codec(plan(scheme), ranks(200))
    targets, context = window(plan(scheme), 200, 6, 0)
    planes = codec.encode(targets, context)
    assert {name: values.dtype for name, values in planes.items()} == codec.planes
    padded = {
        name: np.pad(values, (0, 7 * (name in ("octaves", "bits", "codes")))).astype(values.dtype)
        for name, values in planes.items()
    }
    one, other = codec.decode(planes, context), codec.decode(padded, context)
    assert one.ids.equal(other.ids) and one.logprobs.equal(other.logprobs) and one.tail.equal(other.tail)

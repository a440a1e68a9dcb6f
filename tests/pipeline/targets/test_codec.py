import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import (
    LOG_STEPS,
    Codec,
    Context,
    Kept,
    Plan,
    Planes,
    Ranks,
    Selected,
    SparseTargets,
    encode_log,
    label_codes,
    select_logits,
)

SCHEMES = ("pps", "threshold", "topk", "random")


def plan(scheme: str, tau: float = 0.02, k: int = 8, cap: int = 50) -> Plan:
    return Plan(scheme, tau, k, cap, 50, (1.0,), 0)


def window(scheme: Plan, vocab: int, positions: int, seed: int, scale: float = 3.0) -> tuple[Kept, Context]:
    """What is kept of random logits, and the context they are encoded in; some positions have no label."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, vocab, generator=generator) * scale
    # a likely token is the label in half of the rows
    labels = torch.randint(-1, vocab, (positions,), generator=generator)
    labels = torch.where(torch.rand(positions, generator=generator) < 0.5, logits.argmax(1), labels)
    uniforms = torch.from_numpy(scheme.uniforms(f"w{seed}", positions))
    selected = select_logits(logits, labels, scheme, uniforms)
    return selected.kept[0], context_of(selected, labels, f"w{seed}")


def context_of(selected: Selected, labels: torch.Tensor, key: str) -> Context:
    codes = label_codes(selected.label_logprobs.numpy(), 0, key)
    return Context(torch.where(labels < 0, -100, labels).numpy(), codes, key)


def dense(targets: SparseTargets, vocab: int) -> torch.Tensor:
    """Weights, float64 [N, V]."""
    weights = torch.zeros(targets.positions, vocab + 1).double()
    weights.scatter_(1, targets.ids.long() % (vocab + 1), targets.logprobs.double().exp())
    return weights[:, :vocab]


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
    kept, context = window(chosen, vocab, positions, seed, scale)
    before, after = kept.targets, codec.decode(codec.encode(kept, context), context)
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
    kept, context = window(chosen, 200, 12, 1)
    before, after = kept.targets, codec.decode(codec.encode(kept, context), context)
    assert after.ids.equal(before.ids) and torch.allclose(after.logprobs, before.logprobs, atol=1e-6)
    assert codec.cell(0.3) == 0.0


@pytest.mark.parametrize("shape", ["peaked", "flat", "two", "one", "random"])
def test_decoded_pps_is_unbiased(shape: str) -> None:
    """Over 1,000 positions with draws and rounding of their own: each mean weight within 5 standard errors of p."""
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
    weights = dense(codec.decode(codec.encode(selected.kept[0], context), context), vocab)
    error = weights.std(0) / runs**0.5
    allowed = 5 * error + 1e-7
    # a token so rare that it was never drawn has no error to estimate: its mean is 0 and p is the whole deviation
    allowed += torch.where(error == 0, 5 * (p * chosen.tau / runs).sqrt(), 0.0)
    assert bool(((weights.mean(0) - p).abs() <= allowed).all())


HEADS = {"peaked": [1.0], "several": [0.62, 0.3, 0.08], "flat": [1 / 20] * 20}
MASSES = [1e-6, 1e-4, 2.4e-4, 2.5e-4, 1.7e-3, 0.03, 0.5]


def decoded_weights(
    p: torch.Tensor, label: int, tau: float, runs: int, *, label_rests: bool = True
) -> torch.Tensor:
    """What a reader gets of `runs` positions with the same distribution, float64 [runs, V]."""
    chosen = plan("pps", tau)
    codec = Codec(chosen, ranks(len(p)), label_rests=label_rests)
    labels = torch.full((runs,), label)
    uniforms = torch.from_numpy(chosen.uniforms("rest", runs))
    selected = select_logits(p.log().float().expand(runs, -1), labels, chosen, uniforms)
    context = context_of(selected, labels, "rest")
    decoded = codec.decode(codec.encode(selected.kept[0], context), context)
    decoded.validate(len(p))
    return dense(decoded, len(p))


@pytest.mark.slow
@pytest.mark.parametrize("label_in", ["head", "rest"])
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("mass", MASSES)
def test_the_mass_of_the_rest_is_unbiased_relative_to_itself(mass: float, shape: str, label_in: str) -> None:
    """10,000 draws: within 4 standard errors, which are themselves small, so that nothing hides behind noise."""
    head = (1 - mass) * torch.tensor(HEADS[shape]).double()
    tail = torch.linspace(1.0, 3.0, 60).double()
    p = torch.cat([head, mass * tail / tail.sum()])
    rest = p < 0.02
    weights = decoded_weights(p, 0 if label_in == "head" else len(p) - 1, 0.02, 10_000)
    found, true = weights[:, rest].sum(1), float(p[rest].sum())
    error = float(found.std()) / 100
    assert error <= 0.02 * true
    assert abs(float(found.mean()) - true) <= 4 * error + 1e-5 * true
    deviation = (weights.mean(0) - p).abs()
    # a token drawn in few positions or in none: the variance of a draw of tau is known
    assert bool((deviation <= 5 * (weights.std(0) / 100 + (p * min(mass, 0.02)).sqrt() / 100) + 1e-7).all())


@pytest.mark.parametrize("label_is", ["greatest", "near tau"])
@pytest.mark.parametrize(("tau", "head", "near"), [(1e-3, 0.9, 60), (1e-3, 0.4, 300), (1e-4, 0.9995, 3)])
def test_no_weight_is_squeezed_at_small_tau(tau: float, head: float, near: int, label_is: str) -> None:
    """Whether the label's step of 1/2048 is coarser than all else, or many weights near tau are rounded in one row."""
    others = tau * torch.linspace(1.05, 1.6, near).double()
    left = 1 - head - float(others.sum())
    rest = torch.linspace(1.0, 2.0, int(3 * left / tau) + 10).double()
    p = torch.cat([torch.tensor([head]).double(), others, left * rest / rest.sum()])
    weights = decoded_weights(p, 0 if label_is == "greatest" else near, tau, 1000)
    is_rest = p < tau
    error = weights.std(0) / 1000**0.5 + torch.where(is_rest, (p * tau / 1000).sqrt(), 0.0)
    assert bool(((weights.mean(0) - p).abs() <= 5 * error + 1e-3 * p * ~is_rest + 1e-7).all())
    found = weights[:, is_rest].sum(1)
    assert abs(float(found.mean()) - left) <= 5 * float(found.std()) / 1000**0.5 + 1e-4 * left


def test_a_probability_at_tau_or_beside_it_is_what_selection_took_it_for() -> None:
    """Selection compares float32 p; a weight within 1e-6 of tau no longer says on which side of it p was."""
    tau = 0.02
    for factor in (1.0, 1 - 2e-7, 1 - 9e-7, 1 + 9e-7):
        near = tau * factor
        p = torch.cat([torch.tensor([0.5, near]).double(), torch.full((60,), (0.5 - near) / 60).double()])
        weights = decoded_weights(p, 0, tau, 2000)
        error = float(weights[:, 1].std()) / 2000**0.5
        assert abs(float(weights[:, 1].mean()) - near) <= 5 * error + 1e-6


def test_caches_of_schema_version_2_decode_as_they_did() -> None:
    """No code of the rest beside a likely label: its weight is what its log code says, a rest of nothing 2^-23."""
    p = torch.tensor([1 - 1e-4, *([1e-5] * 10)]).double()
    old, new = (decoded_weights(p, 0, 0.02, 50, label_rests=flag) for flag in (False, True))
    assert set((-old[:, 0].log() * LOG_STEPS).round().tolist()) <= {0.0, 1.0}
    assert float(old[:, 1:].sum(1).min()) == pytest.approx(2.0**-23, rel=1e-3)
    assert float(new[:, 1:].sum(1).mean()) == pytest.approx(1e-4, rel=0.3)


def test_a_label_beside_tau_is_coded_whichever_way_it_is_rounded() -> None:
    """Two codes of margin: a label that may not be in the head is never taken to be there."""
    for factor in (1 - 1e-3, 1 - 1e-7, 1.0, 1 + 1e-7, 1 + 3e-4, 1 + 6e-4, 1 + 2e-3):
        near = 0.02 * factor
        p = torch.cat([torch.tensor([0.5, near]).double(), torch.full((60,), (0.5 - near) / 60).double()])
        weights = decoded_weights(p, 1, 0.02, 200)
        assert abs(float(weights[:, 1].mean()) - near) <= 5 * float(weights[:, 1].std()) / 200**0.5 + 2e-5


def test_damaged_codes_of_the_rest_are_refused() -> None:
    chosen, codec = plan("pps"), Codec(plan("pps"), ranks(11))
    p = torch.tensor([[1 - 1e-4, *([1e-5] * 10)]])
    selected = select_logits(p.log(), torch.tensor([0]), chosen, torch.tensor([[[0.5]]]).double())
    context = context_of(selected, torch.tensor([0]), "w")
    planes = codec.encode(selected.kept[0], context)
    assert len(planes["codes"]) == 1
    for codes, expected in (([65], "too large"), ([], "too short")):
        with pytest.raises(ValueError, match=expected):
            codec.decode({**planes, "codes": np.array(codes, np.uint8)}, context)


def test_positions_without_a_label_cost_nothing() -> None:
    chosen = plan("pps")
    codec = Codec(chosen, ranks(100))
    targets = window(chosen, 100, 6, 0)[0].targets
    nothing = SparseTargets(
        ids=torch.full_like(targets.ids, -1),
        logprobs=torch.full_like(targets.logprobs, float("-inf")),
        tail=targets.tail,
    )
    planes = codec.encode(Kept.exact(nothing), Context.none(6))
    assert all(len(planes[name]) == 0 for name in ("octaves", "bits", "codes"))
    assert not planes["heads"].any() and not planes["draws"].any()
    assert codec.decode(planes, Context.none(6)).ids.shape == (6, 0)


def test_an_implied_label_costs_nothing_and_keeps_its_precise_weight() -> None:
    chosen = plan("pps")
    codec = Codec(chosen, ranks(50))
    logits = torch.full((1, 50), -3.0)
    logits[0, 4] = 2.0
    labels = torch.tensor([4])
    selected = select_logits(logits, labels, chosen, torch.full((1, 1, 1), 0.5, dtype=torch.float64))
    context = context_of(selected, labels, "w")
    planes = codec.encode(selected.kept[0], context)
    assert planes["heads"].tolist() == [0] and len(planes["codes"]) == 0
    decoded = weights_of(codec.decode(planes, context), 0)
    assert decoded[4] == pytest.approx(float(torch.softmax(logits, 1)[0, 4]), rel=1 / 2048)


def test_targets_without_the_label_that_must_be_there_are_refused() -> None:
    targets = SparseTargets(
        ids=torch.tensor([[5]], dtype=torch.int32),
        logprobs=torch.tensor([[0.0]]),
        tail=torch.tensor([float("-inf")]),
    )
    context = Context(np.array([3]), encode_log(np.array([-0.1])), "w")
    with pytest.raises(ValueError, match="label"):
        Codec(plan("pps"), ranks(10)).encode(Kept.exact(targets), context)


def test_first_and_last_id_survive() -> None:
    codec = Codec(plan("topk"), Ranks.of(np.arange(100, dtype=np.int32)[::-1].copy()))
    targets = SparseTargets(
        ids=torch.tensor([[0, 99]], dtype=torch.int32),
        logprobs=torch.tensor([[0.25, 0.5]]).log(),
        tail=torch.tensor([0.25]).log(),
    )
    planes = codec.encode(Kept.exact(targets), Context.none(1))
    assert codec.decode(planes, Context.none(1)).ids.tolist() == [[0, 99]]


def test_duplicate_ids_are_refused() -> None:
    targets = SparseTargets(
        ids=torch.tensor([[5, 5]], dtype=torch.int32),
        logprobs=torch.tensor([[0.5, 0.5]]).log(),
        tail=torch.tensor([float("-inf")]),
    )
    with pytest.raises(ValueError, match="duplicate id"):
        Codec(plan("pps"), ranks(10)).encode(Kept.exact(targets), Context.none(1))


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

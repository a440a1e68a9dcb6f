import pytest
import torch

from ddk_pipe.pipeline.targets import Plan, Selected, join, select, select_logits
from ddk_pipe.pipeline.targets.selected import as_one_piece


def plan(scheme: str = "pps", tau: float = 0.02) -> Plan:
    return Plan(scheme, tau, 3, 50, 20, (1.0,), 0)


def test_head_is_what_selection_compared_with_tau_and_mass_what_the_draws_share() -> None:
    """Also where a weight is tau itself, or so near it that float32 weights no longer tell."""
    tau = 0.02
    near = torch.tensor([tau, tau * (1 - 1e-7), tau * (1 - 5e-7), tau * (1 + 5e-7)])
    p = torch.cat([near, ((1 - near.sum()) / 60).expand(60)])[None]
    for offset in (0.0, 0.3, 0.7):
        kept = select(p, plan(), torch.tensor([[offset]]).double())
        ids, head = kept.targets.ids[0].long(), kept.head[0]
        assert torch.equal(head, p[0, ids] >= torch.tensor(tau))
        assert head.sum() == int((p >= torch.tensor(tau)).sum())
        weights = kept.targets.logprobs[0].double().exp()
        assert torch.allclose(weights[~head], kept.mass / (~head).sum(), atol=1e-7)
        assert abs(float(weights[~head].sum() - kept.mass[0])) < 1e-7


def test_a_token_drawn_twice_is_head() -> None:
    p = torch.tensor([0.019, *([0.0005] * 1962)])[None]
    kept = select(p / p.sum(), plan(), torch.tensor([[0.0]]).double())
    twice = kept.head[0].nonzero()[:, 0]
    weights = kept.targets.logprobs[0].double().exp()
    assert all(float(weights[slot]) >= 0.02 - 1e-9 for slot in twice)
    shares = weights[~kept.head[0]]
    assert torch.allclose(shares, shares[0].expand_as(shares), atol=1e-9)


def test_other_schemes_have_a_head_only() -> None:
    p = torch.softmax(torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 2, 1)
    for scheme in ("threshold", "topk", "random"):
        kept = select(p, plan(scheme), torch.rand(4, plan(scheme).uniforms_per_position).double())
        assert torch.equal(kept.head, kept.targets.ids >= 0) and not kept.mass.any()


def test_rows_and_join_keep_head_and_mass_beside_the_targets() -> None:
    logits = torch.randn(9, 80, generator=torch.Generator().manual_seed(2)) * 4
    labels = torch.tensor([0, -100, 5, 7, -100, 1, 2, 3, 4])
    uniforms = torch.from_numpy(plan().uniforms("w", 9))
    whole = select_logits(logits, labels, plan(), uniforms)
    parts = [
        select_logits(logits[i : i + 2], labels[i : i + 2], plan(), uniforms[:, i : i + 2])
        for i in range(0, 9, 2)
    ]
    for other in (join(parts), join([whole.rows(slice(0, 4)), whole.rows(slice(4, 9))])):
        (one,), (two,) = whole.kept, other.kept
        assert torch.equal(one.targets.ids, two.targets.ids)
        assert torch.equal(one.head, two.head) and torch.allclose(one.mass, two.mass, atol=1e-12)
    assert not whole.kept[0].head[1].any() and whole.kept[0].mass[1] == 0


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
@pytest.mark.parametrize("positions", [7, 0])
def test_a_selection_travels_as_one_piece(scheme: str, positions: int) -> None:
    chosen = plan(scheme)
    logits, labels = torch.randn(positions, 80) * 4, torch.randint(-1, 80, (positions,))
    sent = select_logits(logits, labels, chosen, torch.from_numpy(chosen.uniforms("w", positions)))
    copies: list[torch.Tensor] = []

    def moved(piece: torch.Tensor) -> torch.Tensor:
        copies.append(piece.clone())
        return copies[0]

    came = Selected.of_tensors(as_one_piece(sent.tensors(), moved))
    assert len(copies) == 1
    for one, other in zip(sent.tensors(), came.tensors(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    assert sent.on_host() is sent

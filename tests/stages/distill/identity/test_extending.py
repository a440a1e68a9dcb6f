"""More steps for a finished run: the same bits as if it had been so long from the start, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, order_of, rows_of, weights_of

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, load_project
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.schedules import learning_rate, stable_steps, steps_alike

SHORT = ("distill.batch_tokens=64", "distill.interval_steps=2", "distill.validation_windows=1")
CONSTANT = ("distill.schedule.name=constant", "distill.schedule.warmup_fraction=0")


def run(manifest: Path, name: str, *sets: str) -> Path:
    project = load_project(manifest, [*SHORT, *sets, f"distill.name={name}"])
    distill(project)
    return project.run


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_constant_goes_on_to_the_same_bits(cached: Path) -> None:
    whole = run(cached, "whole", *CONSTANT, "distill.steps=8")
    grown = run(cached, "grown", *CONSTANT, "distill.steps=4")
    assert steps_kept(grown) == [4]
    assert run(cached, "grown", *CONSTANT, "distill.steps=8") == grown
    assert_same_bits(whole, grown)
    assert steps_kept(grown) == [8]
    with pytest.raises(DdkError, match=r"\(distill.steps 8, now 4\)"):  # what it is now
        run(cached, "grown", *CONSTANT, "distill.steps=4")
    assert run(cached, "grown", *CONSTANT, "distill.steps=8")  # finished


@pytest.mark.slow
def test_an_end_that_cut_an_interval_short_leaves_no_trace(cached: Path) -> None:
    cut = (*CONSTANT, "distill.interval_steps=3")
    whole, grown = (
        run(cached, "whole", *cut, "distill.steps=7"),
        run(cached, "grown", *cut, "distill.steps=4"),
    )
    assert steps_kept(grown) == [4]
    run(cached, "grown", *cut, "distill.steps=7")
    assert order_of(whole) == order_of(grown) and rows_of(whole, "steps") == rows_of(grown, "steps")
    assert all(torch.equal(value, weights_of(grown)[name]) for name, value in weights_of(whole).items())


@pytest.mark.slow
def test_wsd_goes_on_from_before_its_decay(cached: Path) -> None:
    def wsd(steps: int, decay: int) -> tuple[str, ...]:
        return (
            "distill.schedule.name=wsd",
            "distill.schedule.warmup_fraction=0",
            f"distill.schedule.decay_fraction={decay / steps}",
            f"distill.steps={steps}",
        )

    whole, grown = run(cached, "whole", *wsd(10, 2)), run(cached, "grown", *wsd(8, 2))
    assert steps_kept(grown) == [6]  # the decay begins there
    run(cached, "grown", *wsd(10, 2))
    assert_same_bits(whole, grown)


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (("distill.schedule.name=cosine",), "its cosine schedule was made for 2 steps"),
        (("distill.schedule.name=linear",), "its linear schedule was made for 2 steps"),
        (
            (*CONSTANT, "distill.gamma_schedule={name: linear, final_ratio: 0}"),
            r"its gamma_schedule \(linear\)",
        ),
        (
            ("distill.schedule.name=constant", "distill.schedule.warmup_fraction=0.5"),
            r"its warm-up took 1 steps, and that of 4 steps takes 2; set distill.schedule.warmup_fraction to 0.25",
        ),
    ],
)
def test_refused_with_the_reason(cached: Path, sets: tuple[str, ...], why: str) -> None:
    folder = run(cached, "short", *sets, "distill.steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DdkError, match=f"short: cannot go on to 4 steps: {why}"):
        run(cached, "short", *sets, "distill.steps=4")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if "warm-up" in why:
        run(cached, "short", *sets[:1], "distill.schedule.warmup_fraction=0.25", "distill.steps=4")


def test_no_checkpoint_left(cached: Path) -> None:
    folder = run(cached, "short", *CONSTANT, "distill.steps=2")
    (folder / "checkpoints").rename(folder / "elsewhere")
    with pytest.raises(
        DdkError, match="it has no checkpoint left of the 2 steps that a longer run takes alike"
    ):
        run(cached, "short", *CONSTANT, "distill.steps=4")


def test_a_link_in_place_of_the_checkpoints_is_not_followed(cached: Path, tmp_path: Path) -> None:
    """A longer run removes what it would not have come by: never outside of the run's folder."""
    folder = run(cached, "short", *CONSTANT, "distill.steps=2")
    outside = tmp_path / "outside"
    (folder / "checkpoints").rename(outside)
    (outside / "step-00000009").mkdir()
    (folder / "checkpoints").symlink_to(outside)
    with pytest.raises(DdkError, match="it has no checkpoint left"):
        run(cached, "short", *CONSTANT, "distill.steps=4")
    assert len(list(outside.iterdir())) == 2 and (outside / "step-00000002" / "position.json").is_file()


@pytest.mark.slow
def test_killed_while_it_is_extended(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after the folder was made the longer run's, and again after its first checkpoint."""
    whole = run(cached, "whole", *CONSTANT, "distill.steps=8")
    run(cached, "grown", *CONSTANT, "distill.steps=4")
    with monkeypatch.context() as patched:
        patched.setattr("ddk_pipe.stages.distill.stage.Run", None)
        with pytest.raises(TypeError):
            run(cached, "grown", *CONSTANT, "distill.steps=8")
    from ddk_pipe.stages.distill.intervals import end_interval

    def dies(*arguments: object) -> None:
        end_interval(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ddk_pipe.stages.distill.run.end_interval", dies)
        with pytest.raises(KeyboardInterrupt):
            run(cached, "grown", *CONSTANT, "distill.steps=8")
    grown = run(cached, "grown", *CONSTANT, "distill.steps=8")
    assert_same_bits(whole, grown)


def test_steps_alike_are_those_of_the_rates() -> None:
    def options(steps: int, name: str, warmup: float = 0.0, decay: float = 0.5) -> Distill:
        schedule = {"name": name, "warmup_fraction": warmup, "decay_fraction": decay}
        return Distill.model_validate({"steps": steps, "schedule": schedule})

    for name, kept in (("cosine", 0), ("linear", 0), ("constant", 40), ("wsd", 20)):
        short = options(40, name)
        assert stable_steps(short) == kept
        for long in (options(80, name), options(60, name, decay=0.1)):
            alike = steps_alike(short, long)
            assert [learning_rate(short, s) for s in range(alike)] == [
                learning_rate(long, s) for s in range(alike)
            ]
            assert alike >= kept and (
                alike == 40 or learning_rate(short, alike) != learning_rate(long, alike)
            )

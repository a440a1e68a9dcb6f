"""The loop's options: baselines, stopping, validation, trackers, what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MakeProject, make_model, make_tokenizer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.pipeline.mixing import ddk, ddk_initial, learnability
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.identity import Identity
from ddk_pipe.stages.distill.intervals import begin_first
from ddk_pipe.stages.distill.journal import Journal
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.show import lopsided
from ddk_pipe.stages.distill.trackers import folder_of
from ddk_pipe.stages.teachers.hf import Head


def run(manifest: Path, *sets: str) -> tuple[dict[str, Any], Path]:
    """Summary and folder of a run with these settings."""
    project = load_project(manifest, list(sets))
    return distill(project), project.run


def by_step(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for step, rows in itertools.groupby(read_rows(run, "validation"), key=lambda row: row["step"]):
        yield step, list(rows)


# --- DDK in the loop --------------------------------------------------------------------------------


def test_weights_of_the_record_are_the_papers_equations(cached: Path) -> None:
    _, folder = run(cached, "distill.alpha=0.3", "distill.validation_budget=null")
    weights, steps = None, []
    for step, rows in by_step(folder):
        steps.append(step)
        student, teacher = (np.array([row[key] for row in rows]) for key in ("student_ce", "teacher_ce"))
        weights = (
            ddk_initial(student, teacher) if weights is None else ddk(weights, student, teacher, alpha=0.3)
        )
        np.testing.assert_allclose([row["weight"] for row in rows], weights, rtol=1e-12)
    assert steps == [0, 2, 4, 6]


def test_learnability_sees_the_losses_of_the_update_before(cached: Path) -> None:
    _, folder = run(
        cached,
        "distill.mixing=learnability",
        "distill.validation_budget=null",
        "distill.initial=natural",
        "distill.optimizer.learning_rate=1e-2",
    )
    before = weights = None
    for _, rows in by_step(folder):
        student = np.array([row["student_ce"] for row in rows])
        found = np.array([row["weight"] for row in rows])
        if (
            before is not None and weights is not None
        ):  # the first ones are natural, and it is by those that it was drawn
            np.testing.assert_allclose(
                found, learnability(weights, student, student, student_ce_before=before), rtol=1e-12
            )
        before, weights = student, found
    assert (
        weights is not None and abs(weights[0] - 0.5) > 0.01
    )  # or it would be the even mix that nothing is known of


@pytest.mark.slow
def test_realised_shares_are_the_weights_within_one_window(cached: Path) -> None:
    _, folder = run(cached, "distill.steps=12", "distill.interval_steps=3")
    seen = np.zeros(2)
    shares = None
    for _, rows in by_step(folder):
        drawn = np.array([row["windows_drawn"] for row in rows], dtype=float)
        if shares is not None:
            assert np.abs(drawn - seen - shares * 12).max() < 1 + 1e-9  # 3 steps of 4 windows
        seen, shares = drawn, np.array([row["weight"] for row in rows])
    assert seen.sum() == 48


@pytest.mark.slow
def test_training_stops_when_every_gap_is_below_the_threshold(cached: Path) -> None:
    summary, folder = run(cached, "distill.stop_gap_nats=1000", "distill.interval_steps=2")
    assert (summary["steps"], summary["stopped_by_gap"]) == (2, True)
    assert [step for step, _ in by_step(folder)] == [0, 2]
    assert summary["tokens"] == 2 * 128 and (folder / "student" / "model.safetensors").exists()
    summary, _ = run(cached, "distill.stop_gap_nats=-1000", "distill.name=never")
    assert (summary["steps"], summary["stopped_by_gap"]) == (6, False)


@pytest.mark.slow
def test_one_domain_is_enough(make_project: MakeProject) -> None:
    manifest = make_project(domains={"code": {"train": "text/code.jsonl"}})
    from ddk_pipe.stages.cache_teacher import cache_teacher

    cache_teacher(load_project(manifest))
    _, folder = run(manifest)
    assert {row["weight"] for row in read_rows(folder, "validation")} == {1.0}


def far_behind_in_code(parts: Parts, journal: Journal, identity: Identity) -> Position:
    """begin_first of a student that is three nats further behind on the first domain than it is."""
    parts.teacher_ce = parts.teacher_ce - np.array([3.0, 0.0])
    return begin_first(parts, journal, identity)


@pytest.mark.slow
def test_an_interval_of_one_domain_alone_is_warned_of_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddk_pipe.stages.distill.run.begin_first", far_behind_in_code)
    summary, folder = run(cached)
    (warning,) = summary["warnings"]
    assert re.fullmatch(
        r"code gets (9\d\.\d|100\.0)% of the windows of the interval after step 0; Eq\. 1 has no floor; to train on all"
        r" of them set distill\.initial: uniform",
        warning,
    )
    assert json.loads((folder / "run.json").read_text())["warnings"] == [warning]
    assert capsys.readouterr().err.count("distill: warning: code gets") == 1
    for initial in ("uniform", "natural"):  # then Eq. 2's floor holds at every update
        calm, _ = run(cached, f"distill.initial={initial}", f"distill.name={initial}")
        assert calm["warnings"] == []


@pytest.mark.slow
def test_later_intervals_and_the_users_own_word(cached: Path) -> None:
    sets = ["distill.mixing=gap_softmax", "distill.mixing_options={temperature: 0.001}"]
    summary, _ = run(cached, *sets)
    (warning,) = summary["warnings"]
    assert (
        "of the windows of the interval after step 2; to train more on the others use distill.mixing: ddk"
        in warning
    )
    assert lopsided(Distill(), ["a", "b"], [0.81, 0.19], step=4) == (
        "a gets 81.0% of the windows of the interval after step 4;"
        " to train more on the others set distill.largest_ratio, or lower distill.alpha"
    )
    assert lopsided(Distill(), ["a", "b"], [0.2, 0.8], step=0) is None
    assert lopsided(Distill(), ["a"], [1.0], step=0) is None


# --- baselines ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_online_needs_no_cache_and_is_near_offline_training(make_project: MakeProject, cached: Path) -> None:
    """Same student, windows and steps; pps targets are unbiased, so the runs are close but not equal.

    This teacher of random weights knows nothing of the text, so only a large gamma lets its KL fall.
    """
    sets = [
        "distill.steps=12",
        "distill.interval_steps=6",
        "distill.gamma=50",
        "distill.validation_budget=null",
    ]
    offline, _ = run(cached, *sets)
    online, folder = run(cached, *sets, "distill.targets=online", "distill.name=online", "cache.path=nowhere")
    assert not (cached.parent / "nowhere").exists()
    rows = {
        name: read_rows(cached.parent / "out" / "distill" / name, "steps") for name in ("student", "online")
    }
    assert [row["data_order"] for row in rows["student"]] == [row["data_order"] for row in rows["online"]]
    assert rows["student"][0]["ce"] == pytest.approx(rows["online"][0]["ce"], rel=1e-5)
    assert rows["online"][-1]["ce"] == pytest.approx(rows["student"][-1]["ce"], rel=0.05)
    assert all(row["kl"] is not None and row["target_ce"] is None for row in rows["online"])
    first, *_, last = (np.mean([row["kl"] for row in validation]) for _, validation in by_step(folder))
    assert last < first  # a true KL, and it falls
    assert (online["cache_fingerprint"], offline["cache_fingerprint"] != "online") == ("online", True)


def test_gamma_0_is_the_same_run_whatever_the_targets(cached: Path) -> None:
    """Continued pre-training: the teacher has no say."""
    folders = [
        run(cached, "distill.gamma=0", f"distill.targets={targets}", f"distill.name={targets}")[1]
        for targets in ("cache", "online")
    ]
    losses = [[(row["loss"], row["ce"]) for row in read_rows(folder, "steps")] for folder in folders]
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-5)
    assert all(loss == ce for loss, ce in losses[0])


def test_reverse_kl_online(cached: Path) -> None:
    _, folder = run(cached, "distill.targets=online", "distill.direction=reverse")
    assert all(row["kl"] > 0 for row in read_rows(folder, "steps"))


@pytest.mark.slow
def test_reverse_kl_of_targets_that_name_every_token_needs_no_tail(make_project: MakeProject) -> None:
    """Their values are held to float64 in tests/pipeline/losses; here, that such a run is taken on."""
    from ddk_pipe.stages.cache_teacher import cache_teacher

    manifest = make_project(cache={"scheme": "topk", "k": 1000, "shard_windows": 16})
    cache_teacher(load_project(manifest))
    _, folder = run(manifest, "distill.direction=reverse")
    assert all(0 < row["kl"] < math.inf for row in read_rows(folder, "steps"))


def test_a_teacher_that_fails_in_a_step_is_one_line(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names what its batch is here."""

    def states(self: Head, *arguments: Any) -> torch.Tensor:
        if torch.is_inference_mode_enabled():  # of the validation windows, before the first step
            return real(self, *arguments)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    real = Head.states
    monkeypatch.setattr(Head, "states", states)
    line = r"transformers \S+ cannot serve \S+ in float32 \(CUDA out of memory\.\); lower distill.micro_batch_windows"
    with pytest.raises(DdkError, match=line):
        run(cached, "distill.targets=online")


def test_activation_checkpointing_changes_nothing(cached: Path) -> None:
    losses = []
    for name, on in (("a", "false"), ("b", "true")):
        _, folder = run(
            cached, f"distill.activation_checkpointing={on}", f"distill.name={name}", "distill.steps=3"
        )
        losses.append([row["loss"] for row in read_rows(folder, "steps")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about itself while it compiles
def test_compiled_layers_train_the_same(cached: Path) -> None:
    """torch.compile needs a C++ compiler on a CPU."""
    losses = []
    for name, on in (("a", "false"), ("b", "true")):
        _, folder = run(
            cached,
            f"distill.compile={on}",
            f"distill.name={name}",
            "distill.steps=1",
            "student.keep_layers=[0]",
        )
        losses.append([row["loss"] for row in read_rows(folder, "steps")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- validation and record ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_student_that_is_the_teacher_agrees_with_it(cached: Path) -> None:
    """From the same layers: no gap, and agreement wherever the teacher's favourite is in the cache."""
    _, folder = run(cached, "student.keep_layers=[0, 1, 2]", "distill.steps=1")
    _, first = next(iter(by_step(folder)))
    for row in first:
        assert row["gap"] == pytest.approx(0, abs=1e-3)
        assert row["teacher_agreement"] > 0.99 and 0 <= row["calibration_error"] <= 1
        assert row["kl"] is None  # drawn targets


def test_trackers_that_are_not_installed_are_named(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "trackio" else real(name, *more)
    )
    with pytest.raises(DdkError, match=r"distill\.trackers: trackio is not installed; pip install"):
        run(cached, "distill.trackers=[trackio]")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_rows(cached: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = run(cached, "distill.trackers=[tensorboard]")
    events = EventAccumulator(str(folder_of(load_project(cached))))
    events.Reload()
    rows = read_rows(folder, "steps")
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert [event.step for event in events.Scalars("plays/weight")] == [0, 2, 4, 6]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temperature=2.0", r"temperature 2.0 is not in the cache \(it has 1.0\)"),
        (
            "domains.other={train: text/code.jsonl}",
            "no other/train in the cache; run `ddk-pipe cache-teacher`",
        ),
        ("seq_len=64", "seq_len 64, the cache at .* has 32"),
        (
            "student={config: {model_type: llama, vocab_size: 50, hidden_size: 16, num_attention_heads: 2}}",
            "a vocabulary of 50 is smaller than the teacher's",
        ),
    ],
)
def test_a_cache_or_student_that_does_not_fit(cached: Path, override: str, message: str) -> None:
    with pytest.raises(DdkError, match=message):
        run(cached, override)
    assert not (cached.parent / "out" / "distill" / "student" / "student").exists()


def test_a_student_of_another_tokenizer(cached: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tokenizer = make_tokenizer(other, vocab_size=390, seed_text="entirely other words here and there")
    make_model(other, vocab_size=max(400, len(tokenizer.get_vocab())))
    with pytest.raises(DdkError, match=r"student\.model: the tokenizer of .*other is not the one the cache"):
        run(cached, f"student={json.dumps({'model': str(other)})}")


def test_a_validation_loss_that_is_not_a_number(cached: Path) -> None:
    sets = ["distill.optimizer.learning_rate=1e38", "distill.schedule.warmup_fraction=0"]
    with pytest.raises(
        DdkError, match=r"the student's validation loss on domain code is (nan|inf); lower distill"
    ):
        run(cached, *sets, "distill.interval_steps=1", "distill.optimizer.clip_norm=null")


def test_a_cache_without_a_split(cached: Path) -> None:
    import shutil

    shard = next((cached.parent / "out" / "cache" / "plays" / "validation").glob("*.json"))
    shard.unlink()
    with pytest.raises(DdkError, match="1 of 1 shards of plays/validation are not there yet; run `ddk-pipe"):
        run(cached)
    shutil.rmtree(cached.parent / "out" / "cache")
    with pytest.raises(DdkError, match="run `ddk-pipe cache-teacher`"):
        run(cached)

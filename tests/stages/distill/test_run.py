"""The loop's options: baselines, schedules, stopping, validation, trackers, dry runs, what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MakeProject, make_model, make_tokenizer
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.pipeline.mixing import ddk, ddk_initial, learnability
from ddk_pipe.stages.cli.app import app
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.checks import lopsided
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.schedules import gamma_at, learning_rate
from ddk_pipe.stages.distill.show import weight_lines
from ddk_pipe.stages.distill.trackers import folder_of
from ddk_pipe.stages.distill.validation_size import windows_per_domain

MANIFESTS = Path(__file__).resolve().parents[3] / "manifests"


def run(manifest: Path, *sets: str) -> tuple[dict[str, Any], Path]:
    """Summary and folder of a run with these settings."""
    project = load_project(manifest, list(sets))
    return distill(project), project.run


def by_step(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for step, rows in itertools.groupby(read_rows(run, "validation"), key=lambda row: row["step"]):
        yield step, list(rows)


# --- DDK in the loop --------------------------------------------------------------------------------


def test_weights_of_the_record_are_the_papers_equations(cached: Path) -> None:
    _, folder = run(cached, "distill.alpha=0.3")
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
    _, folder = run(cached, "distill.mixing=learnability", "distill.initial=natural")
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


def far_behind_in_code(self: Run, record: Any) -> Any:
    """_start of a student that is three nats further behind on the first domain than it is."""
    self.teacher_ce = self.teacher_ce - np.array([3.0, 0.0])
    return START(self, record)


START = Run._start


@pytest.mark.slow
def test_an_interval_of_one_domain_alone_is_warned_of_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "_start", far_behind_in_code)
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
    offline, _ = run(cached, "distill.steps=12", "distill.interval_steps=6", "distill.gamma=50")
    sets = ["distill.steps=12", "distill.interval_steps=6", "distill.gamma=50", "distill.targets=online"]
    online, folder = run(cached, *sets, "distill.name=online", "cache.path=nowhere")
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


# --- schedules ----------------------------------------------------------------------------------------


def options(**values: Any) -> Distill:
    return Distill.model_validate({"steps": 100, **values})


def test_learning_rates() -> None:
    shapes = {
        name: [
            learning_rate(options(schedule={"name": name, "warmup_fraction": 0.1}), step)
            for step in range(100)
        ]
        for name in ("cosine", "linear", "wsd", "constant")
    }
    for rates in shapes.values():
        assert rates[:10] == pytest.approx([3e-4 * (step + 1) / 10 for step in range(10)])
    assert set(shapes["constant"][9:]) == {3e-4} == set(shapes["wsd"][9:81])
    assert shapes["wsd"][90] == pytest.approx(3e-4 * 0.55)  # half of the way from 1 to 0.1
    assert shapes["linear"][55] == pytest.approx(3e-4 * 0.55) == shapes["cosine"][55]
    for name in ("cosine", "linear", "wsd"):
        assert all(a >= b for a, b in itertools.pairwise(shapes[name][10:]))
        assert 3e-5 <= shapes[name][-1] < 5e-5


def test_the_papers_schedule() -> None:
    paper = load_project(MANIFESTS / "ddk-qwen1.5-14b-to-1.8b.yaml").manifest.distill
    assert learning_rate(paper, 0) == pytest.approx(3e-8)
    assert learning_rate(paper, 999) == pytest.approx(3e-5) == learning_rate(paper, 1000)
    assert learning_rate(paper, 29_999) == pytest.approx(3e-6, rel=1e-3)


@pytest.mark.slow
def test_gamma_schedules(cached: Path) -> None:
    constant = options(gamma=0.5)
    assert {gamma_at(constant, step) for step in range(100)} == {0.5}
    falling = options(gamma=0.5, gamma_schedule={"name": "linear", "first_ratio": 2.0, "final_ratio": 0.0})
    values = [gamma_at(falling, step) for step in range(100)]
    assert values[0] == 1.0 and values[-1] == 0.0 and values[33] == pytest.approx(2 / 3)
    _, folder = run(cached, "distill.gamma_schedule={name: cosine, first_ratio: 0, final_ratio: 1}")
    rows = read_rows(folder, "steps")
    assert rows[0]["gamma"] == 0 and rows[0]["loss"] == rows[0]["ce"]
    assert rows[-1]["gamma"] == pytest.approx(0.2) and rows[-1]["loss"] > rows[-1]["ce"]


# --- validation and record ------------------------------------------------------------------------------


def test_validation_keeps_to_its_budget() -> None:
    given = options(validation_windows=500, interval_steps=10, batch_tokens=1000)
    assert windows_per_domain(given, 100, 5) == 500
    for budget, expected in ((0.5, 10), (0.05, 1), (0.001, 1)):
        bounded = given.model_copy(update={"validation_budget": budget})
        assert windows_per_domain(bounded, 100, 5) == expected
        assert expected * 100 * 5 <= max(budget * 10_000, 500)


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


def test_bars_show_shares() -> None:
    lines = weight_lines(["code", "plays"], [0.25, 0.75], [0.5, -0.125])
    assert [line.count("█") for line in lines] == [8, 22]
    assert "25.0%" in lines[0] and "gap -0.125" in lines[1]


# --- dry runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in MANIFESTS.glob("ddk-*.yaml")))
def test_the_papers_manifests_pass_a_dry_run(name: str) -> None:
    result = CliRunner().invoke(app, ["distill", str(MANIFESTS / name), "--dry-run"])
    assert result.exit_code == 0, result.stderr
    for part in (
        "524,288 tokens a step, 30,000 steps",
        "CE + 0.2 KL(teacher || student) at T = 1",
        "5.0% to 55.0% a domain",
        "warm-up of 1,000 steps to 3e-05, then cosine to 3e-06",
        "500 windows a domain every 1,000 steps",
    ):
        assert part in result.stdout
    values = load_project(MANIFESTS / name).manifest
    assert len(values.domains) == 10
    assert (values.distill.alpha, values.distill.interval_steps, values.distill.gamma) == (0.5, 1000, 0.2)


def test_a_dry_run_imports_no_torch_and_writes_nothing(make_project: MakeProject, tmp_path: Path) -> None:
    manifest = make_project()
    code = (
        "import sys; from typer.testing import CliRunner; from ddk_pipe.stages.cli import app;"
        f"r = CliRunner().invoke(app, ['distill', {str(manifest)!r}, '--dry-run']);"
        "print(r.exit_code, 'torch' in sys.modules, 'not there yet' in r.stdout)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "True"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temperature=2.0", r"distill.temperature: 2.0 is not in cache.temperatures \(1.0\)"),
        ("distill.direction=reverse", "reverse KL needs a tail bucket, and pps caches have none"),
        ("distill.tail=renormalise", "pps caches have no tail to throw away"),
        ("distill.mixing=dkd", "no mixing rule 'dkd'; use 'ddk'"),
        ("distill.mixing_options={eta: 1}", "no option of the mixing rule ddk 'eta'"),
        ("distill.prior={code: 1}", "distill.prior: plays stands in only one of prior and domains"),
        ("distill.prior={code: 0, plays: 0}", "distill.prior: all shares are 0"),
        ("student=null", "student: missing"),
    ],
)
def test_a_dry_run_refuses_what_distill_would(make_project: MakeProject, override: str, message: str) -> None:
    from ddk_pipe.stages.distill import describe

    with pytest.raises(DdkError, match=message):
        describe(load_project(make_project(), [override]))


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

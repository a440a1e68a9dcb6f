"""A student to give away: loads elsewhere, generates the same, and its card says what is known and no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.common import read_student_record, write_student_record
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.export import CardOptions, Target, export


@pytest.fixture
def run(cached: Path) -> Path:
    """A finished run."""
    project = load_project(cached, ["distill.steps=2", "distill.validation_windows=2"])
    distill(project)
    return project.run


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def test_loads_and_generates_the_same(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "given"
    options = ("--license", "mit", "--language", "en", "--language", "de", "--data", "my <b>notes</b>")
    assert call("export", run, "--to", to, "--name", "small", *options)[0] == 0
    assert not [path for path in to.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (to, run / "student"))
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    tokenizer = AutoTokenizer.from_pretrained(to)
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    one, other = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, before))
    assert torch.equal(one, other)
    generation = GenerationConfig.from_pretrained(to)
    assert generation.eos_token_id == tokenizer.eos_token_id and generation.pad_token_id is not None

    card = (to / "README.md").read_text()
    for expected in (
        "license: mit",
        "- en\n- de",
        "my &lt;b>notes&lt;/b>",
        "# small",
        "| plays |",
        "mixing ddk",
    ):
        assert expected in card, expected
    summary = json.loads((run / "run.json").read_bytes())
    assert summary["settings"] in card and summary["cache_fingerprint"] in card
    assert str(tmp_path) not in card and "base_model" not in card  # a local teacher is no hub id


def test_what_was_not_said_is_not_guessed(run: Path, tmp_path: Path) -> None:
    card = (export(run, Target(tmp_path / "given"), CardOptions()) / "README.md").read_text()
    assert "license:" not in card and "language:" not in card and card.count("Not stated") == 3


def test_bfloat16(run: Path, tmp_path: Path) -> None:
    to = export(run, Target(tmp_path / "half", "bfloat16"), CardOptions())
    assert AutoModelForCausalLM.from_pretrained(to, dtype="auto").dtype == torch.bfloat16
    size = [(folder / "model.safetensors").stat().st_size for folder in (to, run / "student")]
    assert size[0] < 0.6 * size[1]


def test_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert "exists already; name a new folder" in call("export", run, "--to", run)[1]
    assert "--dtype int8: unknown" in call("export", run, "--to", tmp_path / "x", "--dtype", "int8")[1]
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    status, err = call("export", run, "--to", tmp_path / "x", "--push", "me/x")
    assert status == 2 and "--push without --license" in err
    status, err = call("export", run, "--to", tmp_path / "x", "--push", "me/x", "--license", "mit")
    assert status == 2 and "not logged in" in err and "hf auth login" in err
    (run / "run.json").rename(run / "kept.json")
    assert "not finished" in call("export", run, "--to", tmp_path / "x")[1]
    (run / "kept.json").rename(run / "run.json")
    with pytest.raises(DdkError, match="no run"):
        export(tmp_path, Target(tmp_path / "x"), CardOptions())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.real
@pytest.mark.timeout(600)
def test_real_vllm_generates_the_same_greedy_tokens(
    cached: Path, tmp_path: Path, need_vllm: None, tiny_teacher: Path
) -> None:
    """Heads of 32: vLLM on a CPU has no smaller ones."""
    start = make_model(tmp_path / "start", vocab_size=400, hidden_size=128)
    for path in tiny_teacher.glob("token*"):
        shutil.copy(path, start)
    project = load_project(cached, [f"student={{model: {start}}}", "distill.steps=2"])
    distill(project)
    to = export(project.run, Target(tmp_path / "given"), CardOptions())
    prompts = ["The quick brown", "def add(a", "To be, or"]
    tokenizer, model = AutoTokenizer.from_pretrained(to), AutoModelForCausalLM.from_pretrained(to)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=12, do_sample=False)
        expected.append(output[0, ids.shape[1] :].tolist())
    code = (
        "import json, sys\nfrom vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    engine = LLM(sys.argv[1], dtype='float32', max_model_len=64, enforce_eager=True)\n"
        "    found = engine.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=12))\n"
        "    with open(sys.argv[3], 'w') as file:\n"
        "        json.dump([list(answer.outputs[0].token_ids) for answer in found], file)\n"
    )
    script = tmp_path / "generate.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(to), json.dumps(prompts), str(tmp_path / "said.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "said.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_settings_that_transformers_refuses_are_left_out_and_said(
    run: Path, tmp_path: Path, dtype: str
) -> None:
    settings = {"do_sample": False, "temperature": 0.6, "max_new_tokens": 9}
    (run / "student" / "generation_config.json").write_text(json.dumps(settings))
    status, said = call("export", run, "--to", tmp_path / "given", "--dtype", dtype)
    assert status == 0 and said.count("export: generation_config.json goes without temperature") == 1
    given = json.loads((tmp_path / "given" / "generation_config.json").read_text())
    assert "temperature" not in given and given["max_new_tokens"] == 9


# --- what the student was made of -------------------------------------------------------------------


def replaced(student: Path) -> None:
    """Other weights in the student's place, as a mistaken copy would have it."""
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})


def test_the_record_goes_along(run: Path, tmp_path: Path) -> None:
    """Beside the weights and in the card's metadata, of the weights as they are given away."""
    summary = json.loads((run / "run.json").read_bytes())
    record = json.loads((run / "student" / "ddk_pipe.json").read_bytes())
    assert record == summary["student"]
    assert (
        record["cache_fingerprint"] == summary["cache_fingerprint"]
        and record["settings"] == summary["settings"]
    )
    assert (
        record["teacher"] == "teacher" and record["started_from"] == record["teacher_weights"]
    )  # kept layers
    assert record["files"].keys() == {"config.json", "model.safetensors"}
    for dtype in ("float32", "bfloat16"):
        to = export(run, Target(tmp_path / dtype, dtype), CardOptions())
        given = json.loads((to / "ddk_pipe.json").read_bytes())
        assert ModelCard.load(to / "README.md").data.to_dict()["ddk_pipe"] == given
        same = given["files"]["model.safetensors"] == record["files"]["model.safetensors"]
        assert same == (dtype == "float32")
        assert {**given, "files": {}} == {**record, "files": {}}
        assert str(tmp_path) not in json.dumps(given)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replaced, "student/model.safetensors: not what the run saved (blake2b "),
        (
            lambda student: (student / "model.py").write_text("1"),
            "student/model.py: not a file that the run saved",
        ),
        (lambda student: (student / "ddk_pipe.json").unlink(), "student/ddk_pipe.json: not there"),
        (lambda student: (student / "ddk_pipe.json").write_text("[]"), "student/ddk_pipe.json: damaged"),
        (
            lambda student: make_tokenizer(student, seed_text="zebra quartz " * 50),
            "its tokenizer is not the one",
        ),
    ],
)
def test_a_student_that_was_replaced_is_refused(
    run: Path, tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    change(run / "student")
    status, said = call("export", run, "--to", tmp_path / "given")
    assert status == 2 and told in said and len(said.splitlines()) == 1
    assert not (tmp_path / "given").exists()


def test_a_record_that_was_replaced_along_with_the_weights(run: Path, tmp_path: Path) -> None:
    """The run's own record tells."""
    replaced(run / "student")
    record = read_student_record(run / "student")
    assert record is not None
    write_student_record(run / "student", record)
    status, said = call("export", run, "--to", tmp_path / "given")
    assert status == 2 and "ddk_pipe.json: not what the run wrote" in said


def test_a_student_of_an_older_version(run: Path, tmp_path: Path) -> None:
    (run / "student" / "ddk_pipe.json").unlink()
    summary = json.loads((run / "run.json").read_bytes())
    del summary["student"]
    (run / "run.json").write_text(json.dumps(summary))
    status, said = call("export", run, "--to", tmp_path / "given")
    assert status == 0 and "saved before students had a record, so its weights cannot be checked" in said
    assert "ddk_pipe:" not in (tmp_path / "given" / "README.md").read_text()

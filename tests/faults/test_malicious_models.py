"""Model folders and runs made by an enemy, through every command that reads one: they are data.

No code of theirs is run (a canary would show it), nothing outside of them is read into what is given away or written,
and what cannot be read ends in one line.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import write_jsonl, write_project
from typer.testing import CliRunner

from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.distill import distill

STRANGE = "<script>alert(1)</script>"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


class Enemy:
    """A finished run, its manifest and its teacher, to spoil; a file that only code makes; a folder outside."""

    def __init__(self, folder: Path, whole: Path, teacher: Path) -> None:
        shutil.copytree(whole, folder / "project")
        shutil.copytree(teacher, folder / "teacher")
        self.folder, self.teacher = folder, folder / "teacher"
        self.manifest = folder / "project" / "manifest.yaml"
        self.run = folder / "project" / "out" / "distill" / "student"
        self.student = self.run / "student"
        self.canary, self.outside = folder / "canary", folder / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("SECRET")

    def call(self, *arguments: Any, status: int = 2) -> str:
        """What the command line says; checks what may not happen."""
        before = tree(self.outside)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert not self.canary.exists(), "code of a stranger was run"
        assert tree(self.outside) == before, "something outside was changed"
        assert result.exit_code == status, (result.output, result.exception)
        assert "\x1b]" not in result.output, "a terminal would obey this"
        lines = [line for line in result.output.splitlines() if line.startswith("ddk-pipe:")]
        assert len(lines) == (status != 0)
        return lines[0] if lines else result.output

    def to(self) -> Path:
        return self.folder / "exported"

    def commands_on_the_run(self) -> list[list[Any]]:
        return [["report", self.run], ["export", self.run, "--to", self.to()], ["inspect", self.run]]

    def code(self) -> str:
        """A module that makes the canary, with all classes that a folder could ask for."""
        return (
            f"from pathlib import Path\nPath({str(self.canary)!r}).touch()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
            "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
            "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def update(path: Path, values: dict[str, Any]) -> None:
    edit(path, lambda found: found.update(values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, cached_output: Path) -> Path:
    """A project with a finished run, made once."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = write_project(folder, tiny_teacher)
    shutil.copytree(cached_output, folder / "out")
    distill(load_project(manifest, ["distill.steps=2"]))
    return folder


@pytest.fixture
def enemy(tmp_path: Path, whole: Path, tiny_teacher: Path) -> Enemy:
    return Enemy(tmp_path, whole, tiny_teacher)


# --- model folders ----------------------------------------------------------------------------------


def as_each(enemy: Enemy) -> list[tuple[Path, list[Any]]]:
    """Every way in for a model's folder: (the folder, the command that reads it)."""
    start, second = enemy.folder / "start", enemy.run.with_name("second")
    shutil.copytree(enemy.teacher, start, dirs_exist_ok=True)
    shutil.copytree(enemy.run, second, dirs_exist_ok=True)
    model = f"student={{model: {start}}}"
    sets = ["--set", f"teacher.model={enemy.teacher}", "--set", f"cache.path={enemy.folder / 'new'}"]
    return [
        (enemy.teacher, ["cache-teacher", enemy.manifest, *sets]),
        (start, ["distill", enemy.manifest, "--set", model, "--set", "distill.name=other"]),
        (enemy.student, ["evaluate", enemy.run, "--windows", "1"]),
        (second / "student", ["export", second, "--to", enemy.to(), "--dtype", "bfloat16"]),
    ]


@pytest.mark.slow
def test_a_model_with_code_of_its_own(enemy: Enemy) -> None:
    """Refused, and nobody is asked: standard input may be anybody."""
    for folder, command in as_each(enemy):
        (folder / "evil.py").write_text(enemy.code())
        classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        update(folder / "config.json", {"model_type": "evil", "auto_map": classes})
        assert "needs code that comes with it, and that is not run unasked" in enemy.call(*command)


@pytest.mark.slow
def test_code_beside_an_architecture_that_is_known(enemy: Enemy) -> None:
    """transformers' own class is taken; a run's student is refused, unless the run is too old to know its files."""
    for folder, command in as_each(enemy):
        (folder / "evil.py").write_text(enemy.code())
        classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        update(folder / "config.json", {"auto_map": classes})
        if (folder / "ddk_pipe.json").exists():
            assert "config.json: not what the run saved" in enemy.call(*command)
            (folder / "ddk_pipe.json").unlink()
            edit(folder.parent / "run.json", lambda found: found.pop("student"))
        enemy.call(*command, status=0)


def test_a_tokenizer_with_code_of_its_own(enemy: Enemy) -> None:
    sets = ["--set", f"teacher.model={enemy.teacher}", "--set", f"tokenizer={enemy.teacher}"]
    for folder, command in (
        (enemy.teacher, ["prepare", enemy.manifest, *sets]),
        (enemy.student, ["evaluate", enemy.run]),
        (enemy.student, ["export", enemy.run, "--to", enemy.to()]),
    ):
        (folder / "evil.py").write_text(enemy.code())
        wanted = {
            "tokenizer_class": "EvilTokenizer",
            "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        }
        update(folder / "tokenizer_config.json", wanted)
        assert "no tokenizer at" in enemy.call(*command)


@pytest.mark.slow
def test_pickles_beside_the_weights(enemy: Enemy) -> None:
    """Never read, and not given away."""
    for folder, command in as_each(enemy):
        for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt"):
            torch.save(Bomb(enemy.canary), folder / name)
        enemy.call(*command, status=0)
    shutil.rmtree(enemy.to())
    enemy.call("export", enemy.run, "--to", enemy.to(), status=0)
    assert not {path.suffix for path in enemy.to().iterdir()} & {".bin", ".pt"}


def test_pickles_in_place_of_the_weights(enemy: Enemy) -> None:
    """Alone, named by an index of safetensors, and called so."""
    for folder, command in as_each(enemy):
        weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        torch.save(Bomb(enemy.canary), folder / "pytorch_model.bin")
        aside = weights.read_bytes()
        weights.unlink()
        assert "holds no weights (*.safetensors)" in enemy.call(*command)
        (folder / "other.safetensors").write_bytes(aside)
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
        assert "names 'pytorch_model.bin', which is no *.safetensors of that folder" in enemy.call(*command)


def test_an_index_that_leads_outside(enemy: Enemy) -> None:
    for folder, command in as_each(enemy):
        weights = folder / "model.safetensors"
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
        weights.rename(folder / "other.safetensors")
        shutil.copy(folder / "other.safetensors", enemy.outside / "weights.safetensors")
        for place in (os.path.relpath(enemy.outside, folder), str(enemy.outside)):
            index = {"weight_map": dict.fromkeys(names, f"{place}/weights.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            assert "weights.safetensors', which is no" in enemy.call(*command)


def test_links_are_not_exported(enemy: Enemy) -> None:
    """What is exported is given away: not the file of this machine that a link leads to."""
    for name in ("LICENSE", "vocab.txt"):
        (enemy.student / name).symlink_to(enemy.outside / "secret")
        assert f"{name}: a link, which is not exported" in enemy.call("export", enemy.run, "--to", enemy.to())
        (enemy.student / name).unlink()
    assert not enemy.to().exists()
    enemy.student.rename(enemy.folder / "elsewhere")
    enemy.student.symlink_to(enemy.folder / "elsewhere")
    assert "a link, which is not exported" in enemy.call("export", enemy.run, "--to", enemy.to())


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x('touch CANARY') }}{% endfor %}",
        "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
        "{{ strftime_now.__globals__ }}",
        "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_chat_templates_that_reach_for_python(enemy: Enemy, template: str) -> None:
    """Jinja's sandbox refuses them: one line, or nothing comes of it."""
    (enemy.teacher / "chat_template.jinja").write_text(template.replace("CANARY", str(enemy.canary)))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_jsonl(enemy.folder / "project" / "text" / "code.jsonl", [chat] * 20)
    sets = [
        f"teacher.model={enemy.teacher}",
        f"output={enemy.folder / 'new'}",
        "domains.code.messages=messages",
    ]
    words = [word for value in sets for word in ("--set", value)]
    assert "code" in enemy.call("prepare", enemy.manifest, *words)


# --- the record of a run ----------------------------------------------------------------------------


def rows(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change every row of a table."""

    def spoil(run: Path) -> None:
        found = [json.loads(line) for line in (run / name).read_text().splitlines()]
        for row in found:
            change(row)
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in found))

    return spoil


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


def summary(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda run: edit(run / "run.json", change)


ESCAPE = "\x1b]0;evil\x07"
DAMAGED: dict[str, Callable[[Path], object]] = {
    "run.json deep": text("run.json", "[" * 100_000),
    "run.json a list": text("run.json", "[1]"),
    "run.json a huge number": text("run.json", '{"steps": ' + "9" * 5000 + "}"),
    "run.json of other types": summary(lambda v: v.update(manifest=3)),
    "run.json with versions of other types": summary(lambda v: v.update(versions=[1])),
    "run.json with text for numbers": summary(lambda v: v.update(tokens=STRANGE)),
    "run.json without a cache": summary(lambda v: v["manifest"].update(cache=None)),
    "run.json with a cache of another type": summary(lambda v: v["manifest"]["cache"].update(path=[1])),
    "run.json for the terminal": summary(lambda v: v.update(settings=ESCAPE)),
    "evaluation.json deep": text("evaluation.json", "[" * 100_000),
    "evaluation.json of pairs": text("evaluation.json", '[["builtin", 3]]'),
    "evaluation.json of other types": text("evaluation.json", '{"builtin": 3, "tasks": []}'),
    "evaluation.json for the terminal": text("evaluation.json", json.dumps({"tasks": {ESCAPE: {"acc": 1}}})),
    "steps of lists": text("steps.jsonl", "[1]\n"),
    "steps without a step": text("steps.jsonl", '{"loss": 1}\n'),
    "steps of text": rows("steps.jsonl", lambda row: row.update(step="<b>")),
    "steps without end": rows("steps.jsonl", lambda row: row.update(step=float("inf"))),
    "validation without gaps": rows("validation.jsonl", lambda row: row.pop("gap")),
    "validation of text": rows("validation.jsonl", lambda row: row.update(gap=STRANGE)),
    "validation of numbers": text("validation.jsonl", "3\n"),
    "validation for the terminal": rows("validation.jsonl", lambda row: row.update(domain=ESCAPE)),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED.keys())
def test_records_of_other_types(enemy: Enemy, spoil: Callable[[Path], object]) -> None:
    spoil(enemy.run)
    for command in enemy.commands_on_the_run():
        line = enemy.call(*command)
        assert str(enemy.run) in line and len(line) < 500
    assert not enemy.to().exists() and not (enemy.run / "report.html").exists()


def test_html_in_a_record(enemy: Enemy) -> None:
    """Names and settings are text, on the page and in the model card."""
    facts = {"student_ce": 1.0}
    found = {"builtin": {"domains": {STRANGE: facts}}, "tasks": {STRANGE: {STRANGE: STRANGE}}}
    (enemy.run / "evaluation.json").write_text(json.dumps(found))
    summary(lambda v: v.update(settings=STRANGE, command=STRANGE, cache_fingerprint=STRANGE))(enemy.run)
    summary(lambda v: v.update(versions={STRANGE: STRANGE}))(enemy.run)
    summary(lambda v: v["manifest"].update(distill={"mixing": STRANGE}, teacher={"model": STRANGE}))(
        enemy.run
    )
    rows("validation.jsonl", lambda row: row.update(domain=STRANGE + "$\\frac{$" + row["domain"]))(enemy.run)
    for command in enemy.commands_on_the_run():
        enemy.call(*command, status=0)
    for page in (enemy.run / "report.html", enemy.to() / "README.md"):
        assert "<script" not in page.read_text() and "&lt;script" in page.read_text()


def test_links_in_place_of_what_is_written(enemy: Enemy) -> None:
    """They are replaced, not followed."""
    for name in ("report.html", "run.json", "steps.jsonl", "evaluation.json"):
        aside = enemy.run / name
        content = aside.read_bytes() if aside.exists() else b"{}"
        (enemy.outside / name).write_bytes(content)
        aside.unlink(missing_ok=True)
        aside.symlink_to(enemy.outside / name)
    enemy.call("report", enemy.run, status=0)
    enemy.call("evaluate", enemy.run, "--windows", "1", status=0)
    (enemy.run / "run.json").unlink()
    enemy.call("distill", enemy.manifest, "--set", "distill.steps=2", status=0)
    assert not any(path.is_symlink() for path in enemy.run.iterdir() if path.name != "checkpoints")


def test_a_cache_and_an_output_that_lead_elsewhere(enemy: Enemy) -> None:
    """Nothing is written there, and what is no cache is said to be none."""
    summary(lambda v: v["manifest"].update(output=str(enemy.outside)))(enemy.run)
    enemy.call("report", enemy.run, status=0)
    for place in (str(enemy.outside), "file:///etc", "http://127.0.0.1:9/x", "../" * 40 + "etc"):
        record = json.loads((enemy.run / "run.json").read_text())
        manifest = {**record["manifest"], "output": "out", "cache": {"path": place}}
        update(enemy.run / "run.json", {"manifest": manifest})
        enemy.call("evaluate", enemy.run)
        enemy.call("report", enemy.run, status=0)


@pytest.mark.parametrize("name", ["../../../outside/run", "/etc", "..", ".", "a/b", "a\n", ""])
def test_a_sweep_whose_runs_are_elsewhere(enemy: Enemy, name: str) -> None:
    folder = enemy.folder / "project" / "out" / "sweeps" / "s"
    folder.mkdir(parents=True)
    shutil.copytree(enemy.run, enemy.outside / "run")
    entry = {"name": name, "group": "g", "seed": 0, "overrides": []}
    record: dict[str, Any] = {key: "x" for key in ("name", "file", "manifest", "command")} | {
        "versions": {},
        "caches": {},
    }
    (folder / "sweep.json").write_text(json.dumps({**record, "runs": [{**entry, "name": "student"}]}))
    enemy.call("report", folder, status=0)
    (folder / "sweep.json").write_text(json.dumps({**record, "runs": [entry]}))
    assert "sweep.json: damaged" in enemy.call("report", folder)

"""The command line as a user meets it: one line for every mistake."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeProject, make_model, make_tokenizer, write_jsonl
from typer.testing import CliRunner

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.cli import app

runner = CliRunner()


def call(*arguments: object) -> tuple[int, str]:
    """Exit status and standard error of a command in this process."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def refused(*arguments: object) -> str:
    """The one line that a command stops with."""
    status, text = call(*arguments)
    lines = [line for line in text.splitlines() if line.startswith("ddk-pipe: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in text, text
    assert text.splitlines()[-1] == lines[0]
    return lines[0]


def leftovers(folder: Path) -> list[str]:
    """Half-written things that a failed command left behind."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".partial", ".old"))]


def test_init_writes_a_manifest_that_parses_and_never_overwrites(tmp_path: Path) -> None:
    from ddk_pipe.pipeline.manifest import load_project

    path = tmp_path / "m.yaml"
    assert call("init", path)[0] == 0
    assert load_project(path).manifest.cache.scheme == "pps"
    assert "exists already" in refused("init", path)


# --- mistakes in the manifest ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cache.taau=0.1", "cache.taau: unknown key; did you mean tau?"),
        ("cache.tau=2", "cache.tau: Input should be less than 1, got 2"),
        ("distill.step=5", "did you mean steps?"),
        ("student.model=x", "exactly one of model, config, keep_layers"),
        ("distill.mixing=dkd", "no mixing rule 'dkd'; use 'ddk'"),
        ("nonsense", "expected field=value"),
        ("domains.code.trian=x", "did you mean train?"),
        ("output=../elsewhere", "leaves the manifest's folder"),
        ("teacher.device=cuda", "no CUDA device"),
    ],
)
def test_fields(cached: Path, override: str, expected: str) -> None:
    command = "distill" if override.startswith(("distill", "student")) else "cache-teacher"
    assert expected in refused(command, cached, "--set", override)


def test_missing_manifest_and_broken_yaml(tmp_path: Path) -> None:
    assert "no such manifest" in refused("prepare", tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("domains: [\n  a: b")
    assert "broken.yaml: line" in refused("prepare", broken)
    broken.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("prepare", broken)
    broken.write_text("- just\n- a list\n")
    assert "not a mapping" in refused("prepare", broken)


# --- mistakes in the text -------------------------------------------------------------------------


def test_missing_file(make_project: MakeProject, tmp_path: Path) -> None:
    path = make_project()
    (tmp_path / "text" / "plays.jsonl").unlink()
    line = refused("prepare", path)
    assert "domains.plays.train: no file" in line
    assert not (tmp_path / "out").exists()  # found before anything was written


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": ""}\n'])
def test_empty_domain(make_project: MakeProject, tmp_path: Path, content: str) -> None:
    path = make_project()
    (tmp_path / "text" / "plays.jsonl").write_text(content)
    assert "domains.plays: no text" in refused("prepare", path)
    assert not leftovers(tmp_path)
    assert not (tmp_path / "out" / "tokens" / "plays" / "train").exists()


def test_one_document_cannot_be_both_splits(make_project: MakeProject, tmp_path: Path) -> None:
    path = make_project()
    write_jsonl(tmp_path / "text" / "plays.jsonl", [{"text": "only one"}])
    assert "one document cannot be both" in refused("prepare", path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut sho\n', "code.jsonl:62: not JSON"),
        (b'{"text": "\xff\xfe"}\n', "code.jsonl:62: not UTF-8"),
        (b"[1, 2]\n", "code.jsonl:62: not a JSON object"),
        (b'{"body": "x"}\n', "code.jsonl:62: no field 'text' with text (fields: body)"),
        (b'{"messages": "hi"}\n', "code.jsonl:62: messages is not a list"),
    ],
)
def test_bad_lines_are_named(make_project: MakeProject, tmp_path: Path, line: bytes, expected: str) -> None:
    path = make_project()
    with open(tmp_path / "text" / "code.jsonl", "ab") as file:
        file.write(b"\n" + line)
    assert expected in refused("prepare", path)
    assert not leftovers(tmp_path)


def test_plain_text_that_is_not_utf8(make_project: MakeProject, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("one\ntwo\nübel\n".encode("latin-1"))
    path = make_project()
    assert "latin.txt:3: not UTF-8" in refused("prepare", path, "--set", "domains.code.train=latin.txt")


def test_truncated_gzip(make_project: MakeProject, tmp_path: Path) -> None:
    whole = gzip.compress((json.dumps({"text": os.urandom(4000).hex()}) + "\n").encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    path = make_project()
    assert "cut.jsonl.gz: cannot be read" in refused(
        "prepare", path, "--set", "domains.code.train=cut.jsonl.gz"
    )


def test_not_parquet(make_project: MakeProject, tmp_path: Path) -> None:
    (tmp_path / "fake.parquet").write_text("PAR1 not really")
    path = make_project()
    assert "fake.parquet: not Parquet" in refused("prepare", path, "--set", "domains.code.train=fake.parquet")


# --- mistakes about models ------------------------------------------------------------------------


def test_seq_len_beyond_the_model(make_project: MakeProject) -> None:
    assert "seq_len 512 is beyond teacher.model's 256 positions" in refused(
        "cache-teacher", make_project(), "--set", "seq_len=512"
    )


def test_model_folder_without_weights(make_project: MakeProject, tmp_path: Path, tiny_teacher: Path) -> None:
    empty = tmp_path / "no-weights"
    shutil.copytree(tiny_teacher, empty)
    for weights in empty.glob("*.safetensors"):
        weights.unlink()
    (empty / "pytorch_model.bin").write_bytes(b"a pickle, which is not read")
    assert "holds no weights" in refused("cache-teacher", make_project(), "--set", f"teacher.model={empty}")


def test_model_that_is_nowhere(make_project: MakeProject) -> None:
    line = refused("cache-teacher", make_project(), "--set", "teacher.model=nobody/nothing")
    assert "neither a folder nor to be had" in line


def test_vllm_not_installed(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else real(name, *rest)
    )
    line = refused("cache-teacher", make_project(), "--set", "teacher.backend=vllm")
    assert "vllm is not installed" in line and "pip install" in line


def test_tokenizer_other_than_the_teachers(make_project: MakeProject, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", vocab_size=350)
    line = refused("cache-teacher", make_project(), "--set", "tokenizer=other")
    assert "is not the teacher's" in line


def test_student_tokenizer_other_than_the_caches(cached: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "student", vocab_size=350)
    make_model(tmp_path / "student", vocab_size=400)
    sets = ("--set", "student={model: student}")
    assert "is not the one the cache" in refused("distill", cached, *sets)


def test_student_vocabulary_smaller_than_the_teachers_ids(cached: Path) -> None:
    config = "{model_type: llama, vocab_size: 100, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    line = refused("distill", cached, "--set", f"student={{config: {config}}}")
    assert "a vocabulary of 100 is smaller than the teacher's" in line


def test_student_too_short_for_the_windows(cached: Path) -> None:
    config = (
        "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 2, max_position_embeddings: 16}"
    )
    line = refused("distill", cached, "--set", f"student={{config: {config}}}")
    assert "seq_len 32 is beyond student.config's 16 positions" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.temperature=2.0", "temperature 2.0 is not in the cache (it has 1.0)"),
        ("distill.direction=reverse", "reverse KL needs a tail bucket"),
        ("distill.tail=renormalise", "pps caches have no tail to throw away"),
        ("student.keep_layers=[7]", "layer 7 of a teacher with 3 layers"),
        ("seq_len=16", "the cache at"),
        ("student=null", "student: missing"),
        ("student={config: {hidden_size: 4}}", "model_type is missing"),
        ("student={config: {model_type: nonsense}}", "transformers refuses it"),
        ("student={config: nothing.json}", "no file"),
    ],
)
def test_what_the_cache_or_student_cannot_give(cached: Path, override: str, expected: str) -> None:
    assert expected in refused("distill", cached, "--set", override)
    assert not leftovers(cached.parent)


def test_distill_without_cache(make_project: MakeProject) -> None:
    assert "no teacher cache" in refused("distill", make_project())


def test_cache_with_other_settings_is_refused_and_untouched(cached: Path) -> None:
    before = {
        path: path.read_bytes() for path in (cached.parent / "out" / "cache").rglob("*") if path.is_file()
    }
    line = refused("cache-teacher", cached, "--set", "cache.tau=0.05")
    assert "tau 0.02 there, 0.05 here" in line
    assert before == {path: path.read_bytes() for path in before}


def test_missing_domain_in_the_cache(cached: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text" / "new.jsonl", [{"text": f"new {i}"} for i in range(30)])
    line = refused("distill", cached, "--set", "domains.new={train: text/new.jsonl}")
    assert "no new/train in the cache" in line


# --- the machine ----------------------------------------------------------------------------------


def test_no_free_disk_is_said_before_the_teacher_is_loaded(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_project()
    assert call("prepare", path)[0] == 0
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = refused("cache-teacher", path)
    assert "the disk has 0.00 GB free" in line and not leftovers(tmp_path)


@pytest.mark.slow
def test_disk_that_fills_up_on_the_way(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fake, since no small disk is at hand: the second commit finds no space."""
    path = make_project()
    real, calls = durable.publish_folder, []

    def publish(partial: Path, final: Path) -> None:
        calls.append(final)
        if len([name for name in calls if name.suffix == ".zarr"]) == 2:
            raise OSError(28, "No space left on device", str(partial))
        real(partial, final)

    monkeypatch.setattr(durable, "publish_folder", publish)
    assert "no space left on the disk" in refused("cache-teacher", path)
    assert not leftovers(tmp_path)
    monkeypatch.undo()
    assert call("cache-teacher", path)[0] == 0  # continues


@contextmanager
def ordinary_user(*readable: Path) -> Iterator[None]:
    """Root may write anywhere, so act as nobody for a moment where we are root; `readable` stay readable."""
    if os.geteuid():
        yield
        return
    for path in readable:
        for folder in [path, *path.parents]:
            if folder.owner() == "root" and folder.parts[:2] == ("/", "tmp") and folder != Path("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_write_permission(make_project: MakeProject, tmp_path: Path, tiny_teacher: Path) -> None:
    path = make_project()
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    with ordinary_user(tmp_path, tiny_teacher):
        line = refused("prepare", path, "--set", "output=locked/out")
    assert "no permission to write there" in line


def test_a_file_where_a_folder_is_needed(make_project: MakeProject, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    assert "a file stands where a folder is needed" in refused("prepare", make_project())


def test_inspect_of_something_else(tmp_path: Path) -> None:
    assert "no tokens, cache or run" in refused("inspect", tmp_path)


def run_command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "ddk_pipe.stages.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_exit_status_of_the_real_program(tmp_path: Path) -> None:
    done = run_command("prepare", tmp_path / "nothing.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("ddk-pipe: ")


@pytest.mark.slow
def test_a_cache_in_an_object_store(make_project: MakeProject, s3_url: str, tmp_path: Path) -> None:
    """cache-teacher, inspect and distill over S3, by the commands a user types; nothing of it lies on the disk."""
    path = make_project(cache={"path": s3_url, "shard_windows": 16})
    assert call("cache-teacher", path)[0] == 0
    assert not (tmp_path / "out" / "cache").exists()
    shown = runner.invoke(app, ["inspect", s3_url]).stdout
    assert "code/train" in shown and f"cache {s3_url}" in shown
    assert "nothing to do" in call("cache-teacher", path)[1]
    assert call("distill", path, "--set", "distill.steps=2")[0] == 0


def test_an_object_store_that_is_not_there(
    make_project: MakeProject, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no teacher cache" in refused("inspect", s3_url)
    assert "no teacher cache" in refused("distill", make_project(cache={"path": s3_url}))
    assert "unknown kind of address" in refused("inspect", "http://somewhere/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DDK_PIPE_RETRY_SECONDS", "0.3")
    assert "check network and endpoint" in refused("inspect", s3_url)

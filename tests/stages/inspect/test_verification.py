"""`ddk-pipe verify` as a user meets it: status, one line for each problem, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from caches import fill, make_plan, make_spec
from typer.testing import CliRunner

from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.stages.cli import app

runner = CliRunner()


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-30] ^= 4
    path.write_bytes(content)


def some_file(cache: Path, part: str) -> Path:
    return next((cache / "code" / "train").glob(f"00000.*.zarr/{part}/c/0/0"))


def test_a_sound_cache_by_every_name_it_has(cached: Path) -> None:
    for place in (cached, cached.parent / "out", cached.parent / "out" / "cache"):
        status, out, err = call("verify", place)
        assert status == 0 and "verify: the cache is sound" in err
        assert "code/train" in out and "all" in out
        assert max(map(len, out.splitlines())) <= 100
    assert "verify: 100%" in err


@pytest.mark.slow
def test_damage_is_named_repaired_and_made_again(cached: Path) -> None:
    """From a flipped bit back to the very same cache."""
    cache = cached.parent / "out" / "cache"
    shutil.copytree(cache, cached.parent / "before")
    flip(some_file(cache, "t0/octaves"))
    status, _, err = call("verify", cache)
    lines = err.splitlines()
    assert status == 1 and "Traceback" not in err
    assert [line for line in lines if "t0/octaves/c/0/0: not what was committed" in line] == lines[-2:-1]
    assert f"`ddk-pipe verify {cache} --repair`" in lines[-1] and "cache-teacher" in lines[-1]
    status, _, err = call("verify", cache, "--repair")
    assert status == 1 and err.splitlines()[-1].startswith(
        "verify: removed 2 files and folders; run `ddk-pipe"
    )
    status, _, err = call("verify", cache)
    assert status == 1 and "1 shards are not committed: code/train/00000" in err
    assert "what is there is sound; run `ddk-pipe cache-teacher` for the rest" in err
    assert call("cache-teacher", cached)[0] == 0
    assert call("verify", cache)[0] == 0
    before, after = (call("verify", place, "--json")[1] for place in (cached.parent / "before", cache))
    assert json.loads(before)["splits"] == json.loads(after)["splits"]


@pytest.mark.slow
def test_a_damaged_rank_table(cached: Path) -> None:
    cache = cached.parent / "out" / "cache"
    flip(cache / "code" / "ranks.npy")
    status, _, err = call("verify", cache)
    assert status == 1 and err.count("ranks.npy") == 1 and "restore the files from a copy, or run" in err
    assert call("verify", cache, "--repair")[0] == 1
    assert not (cache / "code" / "ranks.npy").exists()
    assert call("cache-teacher", cached)[0] == 0
    assert call("verify", cache)[0] == 0


def test_json_and_nothing_else_on_standard_output(cached: Path) -> None:
    cache = cached.parent / "out" / "cache"
    (cache / "notes.txt").write_text("mine")
    flip(some_file(cache, "labels"))
    status, out, _ = call("verify", cache, "--json")
    report = json.loads(out)
    assert status == 1 and report["sound"] is False and list(report["bad"]) == ["code/train/00000"]
    assert report["foreign"] == ["notes.txt"] and report["removed"] == []
    assert report["splits"]["plays/train"]["sound"] == report["splits"]["plays/train"]["shards"]


@pytest.mark.slow
def test_an_object_store(s3_url: str) -> None:
    folder = open_folder(s3_url)
    fill(folder, make_spec(make_plan(temperatures=(1.0,))))
    assert call("verify", s3_url)[0] == 0
    name = next(name for name in folder.names("code/train/00000.") if name.endswith("t0/bits/c/0/0"))
    folder.write(name, folder.read(name)[:-1])
    status, _, err = call("verify", s3_url)
    assert status == 1 and f"{s3_url}/{name}: not what was committed" in err
    assert call("verify", s3_url, "--repair")[0] == 1
    assert not folder.names(name)


@pytest.mark.parametrize("content", [None, b"{}", b"not JSON"])
def test_no_cache_to_look_at(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "cache.json").write_bytes(content)
    for flag in ((), ("--repair",)):
        status, out, err = call("verify", tmp_path, *flag)
        assert status == 2 and not out and err.count("\n") == 1 and err.startswith("ddk-pipe: ")


def test_a_store_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DDK_PIPE_RETRY_SECONDS", "0.3")
    status, _, err = call("verify", s3_url, "--repair")
    assert status == 2 and "check network and endpoint" in err

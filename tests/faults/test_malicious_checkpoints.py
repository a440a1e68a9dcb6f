"""A checkpoint made by an enemy: it runs no code, leads nowhere else, takes no memory, and changes no weight."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing import DomainSampler
from ddk_pipe.stages.distill.checkpoints import Checkpoints
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.world import World, Wrapped

STEP = "step-00000003"
SHARDING = "DCP_SHARDING_INFO"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


class Enemy:
    """A checkpoint of a small student to spoil, and a file that only code in it would make."""

    def __init__(self, folder: Path) -> None:
        self.canary, self.outside = folder / "canary", folder / "outside"
        self.student = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        optimizer = torch.optim.AdamW(self.student.parameters())
        self.student(torch.ones(2, 4)).pow(2).sum().backward()
        optimizer.step()
        wrapped = Wrapped(self.student, self.student, World(), sharded=False)  # type: ignore[arg-type]
        self.checkpoints = Checkpoints(
            folder / "run" / "checkpoints", wrapped, optimizer, keep_last=1, keep_best=False
        )
        self.checkpoints.save({"step": 3, "gap": None})
        self.checkpoints.settle()
        self.path = self.checkpoints.folder / STEP
        (self.file,) = self.path.glob("*.safetensors")

    def read(self) -> None:
        self.checkpoints.load(self.checkpoints.found()[-1])

    def refused(self) -> str:
        """The one line it is refused with; no weight has been changed, no code run."""
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.fill_(7.0)
        with pytest.raises(DdkError) as refusal:
            self.read()
        assert not self.canary.exists(), "code of the checkpoint was run"
        assert all(bool((parameter == 7).all()) for parameter in self.student.parameters())
        return str(refusal.value)

    def rewrite(self, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
        """Change the tensors and what the file says of their parts; else it is a sound file of safetensors."""
        tensors = load_file(self.file)
        with safe_open(self.file, framework="pt") as file:
            about = file.metadata()
        parts = json.loads(about[SHARDING])
        change(tensors, parts)
        text = parts["text"] if "text" in parts else json.dumps(parts)
        save_file(tensors, self.file, {**about, SHARDING: text})

    def rewrite_header(
        self, change: Callable[[dict[str, Any]], object], name: str = "model.0.weight"
    ) -> None:
        """Change what the header says of one tensor, whatever safetensors thinks of it."""
        content = self.file.read_bytes()
        (size,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + size])
        change(header[name])
        text = json.dumps(header).encode()
        self.file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.fixture
def enemy(tmp_path: Path) -> Enemy:
    return Enemy(tmp_path)


def test_an_undisturbed_one_is_read(enemy: Enemy) -> None:
    """Or the refusals below would prove nothing."""
    before = {name: value.clone() for name, value in enemy.student.state_dict().items()}
    with torch.no_grad():
        for parameter in enemy.student.parameters():
            parameter.fill_(7.0)
    enemy.rewrite(lambda tensors, parts: None)
    enemy.read()
    assert all(torch.equal(value, before[name]) for name, value in enemy.student.state_dict().items())


# --- code -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_weight_declared_as_bytes(enemy: Enemy) -> None:
    """What torch itself would run: its reader makes the canary here, ours does not look at any of it."""
    shutil.rmtree(enemy.path)
    names = list(enemy.checkpoints._tensors())
    bombs = dict.fromkeys(names, Bomb(enemy.canary))
    save(bombs, storage_writer=FileSystemWriter(enemy.path), no_dist=True)
    (enemy.path / "position.json").write_text('{"step": 3, "gap": null}')
    assert "of an older ddk-pipe, in pickles, which are not read" in enemy.refused()
    load(enemy.checkpoints._tensors(), storage_reader=FileSystemReader(enemy.path), no_dist=True)
    assert enemy.canary.exists(), "this attack is none"


def builds(canary: Path) -> bytes:
    """Nothing but a class that metadata is made of, whose state (BUILD) holds the bomb."""
    meta = StorageMeta()
    meta.__dict__["checkpoint_id"] = Bomb(canary)
    return pickle.dumps(meta)


@pytest.mark.parametrize("make", [lambda canary: pickle.dumps(Bomb(canary)), builds])
def test_a_pickle_as_metadata_beside_sound_tensors(enemy: Enemy, make: Callable[[Path], bytes]) -> None:
    (enemy.path / ".metadata").write_bytes(make(enemy.canary))
    assert "in pickles, which are not read; finish the run with that version" in enemy.refused()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_called_safetensors(enemy: Enemy, zipped: bool) -> None:
    torch.save(Bomb(enemy.canary), enemy.file, _use_new_zipfile_serialization=zipped)
    assert "cannot be read" in enemy.refused()


def test_pickles_beside_the_tensors(enemy: Enemy) -> None:
    for name in ("__0_0.distcp", "pytorch_model.bin", "optimizer.pt", "model.safetensors.index.json"):
        torch.save(Bomb(enemy.canary), enemy.path / name)
    enemy.read()
    assert not enemy.canary.exists()


# --- places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "position", "checkpoint", "folder"])
def test_a_checkpoint_that_is_a_link(enemy: Enemy, place: str) -> None:
    """To a sound one, elsewhere: it is neither read nor, later, removed."""
    path = {
        "file": enemy.file,
        "position": enemy.path / "position.json",
        "checkpoint": enemy.path,
        "folder": enemy.checkpoints.folder,
    }[place]
    path.rename(enemy.outside)
    path.symlink_to(enemy.outside)
    line = enemy.refused()
    assert (
        "not an ordinary file" in line or "a link, and checkpoints are not written or removed outside" in line
    )
    if place == "folder":
        (enemy.outside / ".mine.partial").mkdir()
        with pytest.raises(DdkError, match="outside of the run's folder"):
            enemy.checkpoints.sweep()
        assert sorted(path.name for path in enemy.outside.iterdir()) == [".mine.partial", STEP]


def test_pipes_in_a_checkpoint(enemy: Enemy) -> None:
    """Nothing hangs."""
    for path in (enemy.path / "another.safetensors", enemy.path / "position.json"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        assert "not an ordinary file" in enemy.refused()


# --- sizes and parts --------------------------------------------------------------------------------


HEADERS: dict[str, dict[str, Any]] = {
    "a huge shape": {"shape": [1 << 40, 1 << 20]},
    "a shape that wraps around": {"shape": [1 << 62, 4]},
    "a negative shape": {"shape": [-3, -4]},
    "a shape of NaN": {"shape": [float("nan"), 4]},
    "a fractional shape": {"shape": [3.5, 4]},
    "another shape of the same bytes": {"shape": [4, 3]},
    "bytes beyond the file": {"data_offsets": [1 << 40, (1 << 40) + 48]},
    "bytes before the file": {"data_offsets": [-48, 0]},
    "bytes backwards": {"data_offsets": [48, 0]},
    "another tensor's bytes": {"data_offsets": [0, 48]},
    "an unknown dtype": {"dtype": "O"},
    "another dtype of the same size": {"dtype": "I32"},
}


@pytest.mark.parametrize("values", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_lie(enemy: Enemy, values: dict[str, Any]) -> None:
    enemy.rewrite_header(lambda about: about.update(values))
    assert "cannot be read" in enemy.refused()


@pytest.mark.parametrize("claimed", [0, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_header_of_another_size(enemy: Enemy, claimed: int) -> None:
    content = enemy.file.read_bytes()
    enemy.file.write_bytes(struct.pack("<Q", claimed) + content[8:])
    assert "cannot be read" in enemy.refused()


def test_a_header_of_megabytes(enemy: Enemy) -> None:
    """Refused before it is parsed."""
    enemy.rewrite(lambda tensors, parts: parts.update(text="[" + "[]," * (1 << 20) + "[]]"))
    assert "has a header of 3,1" in enemy.refused()


OFFSETS: dict[str, Any] = {
    "negative": [-1, 0],
    "beyond": [1 << 40, 0],
    "enormous": [1 << 70, 0],
    "of fractions": [0.5, 0],
    "of NaN": [float("nan"), 0],
    "of text": ["0", "0"],
    "too few": [0],
    "too many": [0, 0, 0],
    "along the second axis": [0, 2],
    "none": None,
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_parts_at_offsets_that_cannot_be(enemy: Enemy, offsets: Any) -> None:
    enemy.rewrite(lambda tensors, parts: parts["model.0.weight"].update(saved_offsets=offsets))
    assert "cannot be read" in enemy.refused()


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "[" * 9000, "1" * 5000, '{"model.0.weight": 1}', "\\x00"]
)
def test_parts_that_are_no_parts(enemy: Enemy, text: str) -> None:
    enemy.rewrite(lambda tensors, parts: parts.update(text=text))
    if text in ("", "null"):  # says nothing of parts: every tensor is whole, which is so
        enemy.read()
    else:
        assert "cannot be read" in enemy.refused()


def test_other_tensors_than_the_runs(enemy: Enemy) -> None:
    """One more, one less, one renamed; rows that are missing, or there twice."""
    sound = enemy.file.read_bytes()
    changes: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
        "'evil' is not of the run": lambda tensors, parts: (
            tensors.update(evil=torch.zeros(1)),
            parts.update(evil={"saved_offsets": [0]}),
        ),
        "'optimizer.0.bias.step' is missing": lambda tensors, parts: tensors.pop("optimizer.0.bias.step"),
        "lacks rows": lambda tensors, parts: tensors.update({"model.0.weight": torch.zeros(2, 4)}),
        "has too many": lambda tensors, parts: tensors.update({"model.0.weight": torch.zeros(1000, 4)}),
        "parts of another shape": lambda tensors, parts: tensors.update(
            {"model.0.weight": torch.zeros(3, 5)}
        ),
        "is of torch.float64": lambda tensors, parts: tensors.update(
            {"model.0.weight": torch.zeros(3, 4, dtype=torch.float64)}
        ),
    }
    for said, change in changes.items():
        enemy.file.write_bytes(sound)
        enemy.rewrite(change)
        assert said in enemy.refused()
    enemy.file.write_bytes(sound)
    shutil.copy(enemy.file, enemy.path / "again.safetensors")
    assert "some twice" in enemy.refused()


def test_a_hole_between_the_parts(enemy: Enemy) -> None:
    """The middle one of three processes' files is gone: its rows would stay as they are."""
    enemy.rewrite(lambda tensors, parts: tensors.update({"model.0.weight": tensors["model.0.weight"][:1]}))
    last = {"model.0.weight": torch.zeros(1, 4)}
    parts = {SHARDING: json.dumps({"model.0.weight": {"saved_offsets": [2, 0]}})}
    save_file(last, enemy.path / "shard-00003.safetensors", parts)
    assert "'model.0.weight' lacks rows, or has some twice" in enemy.refused()


def test_no_tensors_at_all(enemy: Enemy) -> None:
    enemy.file.unlink()
    assert "holds no *.safetensors" in enemy.refused()


# --- position.json ----------------------------------------------------------------------------------


POSITIONS = {
    "deep": "[" * 200_000,
    "long": '{"step": 3, "x": "' + "x" * (1 << 24) + '"}',
    "a huge number": '{"step": ' + "9" * 5000 + "}",
    "a list": "[3]",
    "nothing": "",
    "no step": "{}",
    "another step": '{"step": 4}',
    "a step of text": '{"step": "3"}',
    "a step of NaN": '{"step": NaN}',
    "a true step": '{"step": true}',
}


@pytest.mark.parametrize("text", POSITIONS.values(), ids=POSITIONS.keys())
def test_positions_that_are_none(enemy: Enemy, text: str) -> None:
    (enemy.path / "position.json").write_text(text)
    line = enemy.refused()
    assert f"{STEP}: the checkpoint cannot be read" in line and len(line) < 600


SOUND: dict[str, Any] = {
    "step": 3,
    "seconds": 1.0,
    "weights": [1.0],
    "shares": [1.0],
    "sampler": {},
    "settings": "x",
}
OTHERS = {
    "weights of text": {"weights": "[1.0]"},
    "a weight of text": {"weights": ["1.0"]},
    "seconds of text": {"seconds": "1"},
    "a sampler of pairs": {"sampler": [["seed", 0]]},
    "settings of bytes": {"settings": [120]},
    "warnings of numbers": {"warnings": [1]},
    "finished by text": {"finished": "true"},
}


@pytest.mark.parametrize("values", OTHERS.values(), ids=OTHERS.keys())
def test_positions_of_other_types(enemy: Enemy, values: dict[str, Any]) -> None:
    path = enemy.path / "position.json"
    path.write_text(json.dumps(SOUND))
    assert enemy.checkpoints.found()[-1].position_as(Position, lambda position: None).shares == [1.0]
    path.write_text(json.dumps({**SOUND, **values}))
    with pytest.raises(DdkError, match=rf"cannot be read \(position.json: {next(iter(values))}"):
        enemy.checkpoints.found()[-1].position_as(Position, lambda position: None)


def test_a_position_that_the_run_refuses(enemy: Enemy) -> None:
    """Weights that are not a number, a sampler's state without its counts: what the run's own check raises."""
    (enemy.path / "position.json").write_text(json.dumps(SOUND))

    def check(position: Position) -> None:
        DomainSampler([4], seed=0).load_state_dict(position.sampler)

    with pytest.raises(DdkError, match=r"cannot be read .the sampler's state has no 'seed'"):
        enemy.checkpoints.found()[-1].position_as(Position, check)

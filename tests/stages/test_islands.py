"""Documents are islands from text to student: what is cached, trained on and measured is each document's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_teacher
from tiny import MakeProject, make_tokenizer
from transformers import AutoModelForCausalLM

from ddk_pipe.pipeline.cache import CachedWindow, CachedWindows, CacheReader, collate, read_spec, verify
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project, recorded_manifest
from ddk_pipe.pipeline.models import spans_from
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.identity.comparing import differences
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import settings_in
from ddk_pipe.stages.prepare import prepare

STEP = 1 / 2048  # of a cached label's log-probability, nats


def logprobs_alone(model: Any, window: CachedWindow) -> np.ndarray[Any, Any]:
    """The model's log-probabilities of a window's labels, each document by itself; NaN without a label."""
    assert window.starts is not None
    out = np.full(len(window.tokens), np.nan, np.float32)
    for span in spans_from(window.starts):
        tokens = torch.from_numpy(window.tokens[span])[None]
        with torch.no_grad():
            found = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        labels = torch.from_numpy(window.labels[span])
        picked = found.gather(1, labels.clamp_min(0)[:, None])[:, 0].numpy()
        out[span] = np.where(window.labels[span] == NO_LABEL, np.nan, picked)
    return out


def test_cached_rows_are_those_of_the_document_alone(cached: Path, tiny_teacher: Path) -> None:
    project = load_project(cached)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    reader = CacheReader(project.cache, 1.0)
    assert reader.spec.attention == "document" and verify(project.cache).sound
    several = 0
    for number in range(8):
        window = reader.read("code", "train", number)
        assert window.starts is not None
        several += window.starts.sum() > 1
        wanted = logprobs_alone(model, window)
        assert np.array_equal(np.isnan(wanted), np.isnan(window.label_logprobs))
        assert np.nanmax(np.abs(wanted - window.label_logprobs)) <= STEP + 1e-5
    assert several > 1


def test_the_dataset_gives_positions_that_start_anew(cached: Path, tiny_teacher: Path) -> None:
    """With them transformers keeps documents apart in a training loop of one's own."""
    data = CachedWindows(load_project(cached).cache.name)
    batch = collate([data[index] for index in range(4)])
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    picked = logits.log_softmax(-1).gather(2, batch["labels"].clamp_min(0)[..., None])[..., 0]
    live = batch["labels"] != NO_LABEL
    assert (batch["position_ids"][:, 1:] == 0).any()
    assert float((picked - batch["teacher_logprobs"])[live].abs().max()) <= STEP + 1e-4


def test_a_cache_of_windows_is_what_it_was_and_says_what_it_is(make_project: MakeProject) -> None:
    path = make_project(attention="window")
    project = load_project(path)
    cache_teacher(project)
    spec = read_spec(project.cache)
    cache = json.loads(project.cache.read("cache.json"))
    assert cache["schema_version"] == 3 and "attention" not in cache
    assert "attention" not in spec.identity() and "attention" not in settings_in(project)
    assert not any("/starts/" in name for name in project.cache.names())
    window = CacheReader(project.cache, 1.0).read("code", "train", 0)
    assert window.starts is None
    positions = CachedWindows(project.cache.name)[0]["position_ids"]
    assert positions.tolist() == list(range(32))
    assert distill(project)["steps"] == 6

    tokens = prepare(project)["code"]["train"].facts.digest
    for program in (cache_teacher, distill):
        with pytest.raises(
            DdkError, match="made with attention: window, and the manifest says document"
        ) as refused:
            program(load_project(path, ["attention=document"]))
        assert "set attention: window" in str(refused.value.hint)
    assert prepare(project)["code"]["train"].facts.digest == tokens, "refused before its tokens were replaced"


def test_attention_is_part_of_what_cache_and_run_are(cached: Path) -> None:
    project, windows = load_project(cached), load_project(cached, ["attention=window"])
    assert settings_in(project)["attention"] == "document"
    assert settings_in(windows) == {k: v for k, v in settings_in(project).items() if k != "attention"}
    spec = read_spec(project.cache)
    assert spec.identity()["attention"] == "document" and spec.schema_version == 4
    with pytest.raises(DdkError, match="made with attention: document, and the manifest says window"):
        distill(windows)


@pytest.mark.parametrize("attention", ["document", "window"])
def test_online_targets_are_those_that_a_cache_would_hold(cached: Path, attention: str) -> None:
    """The teacher in memory sees each document by itself too, in validation and in the step."""
    sets = [f"attention={attention}", "cache.path=other"]
    if attention == "window":
        cache_teacher(load_project(cached, sets))
    else:
        sets = []
    of_cache = Parts(load_project(cached, sets))
    online = Parts(load_project(cached, [*sets, "distill.targets=online"]))
    for number in range(2):
        one, other = (parts.source.validation(0, number) for parts in (of_cache, online))
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.labels, other.labels)
        assert np.nanmax(np.abs(one.label_logprobs - other.label_logprobs)) <= STEP + 1e-5
    batch = online.make_batch([online.source.read(0, number) for number in range(3)])
    dense = online.source.complete(batch).dense
    assert dense is not None and (batch.documents is not None) == (attention == "document")
    logprobs = dense.logits(dense.states).log_softmax(-1)
    flat = batch.labels.flatten()
    picked = logprobs.gather(1, flat.clamp_min(0)[:, None])[:, 0][flat != NO_LABEL].detach().numpy()
    known = np.concatenate([of_cache.source.read(0, number).label_logprobs for number in range(3)])
    assert np.abs(picked - known[~np.isnan(known)]).max() <= STEP + 1e-5


def test_where_documents_begin_is_checked_when_it_is_read(cached: Path) -> None:
    """A stranger's starts could have a student predict one document from another."""
    from caches import some_shard

    from ddk_pipe.pipeline.cache.windows import _starts

    folder = open_folder(load_project(cached).cache.name)
    _, group = some_shard(folder)
    assert folder.exists(f"{group}/starts/zarr.json")
    labels = np.full(4, NO_LABEL)
    for values in ([0, 0, 1, 0], [1, 2, 0, 0]):
        with pytest.raises(ValueError, match=r"begins with no document|neither 0 nor 1"):
            _starts({"starts": np.array(values, np.uint8)}, labels)
    with pytest.raises(ValueError, match="a label in another document"):
        _starts({"starts": np.array([1, 1, 0, 0], np.uint8)}, np.array([5, NO_LABEL, NO_LABEL, NO_LABEL]))


@pytest.mark.slow
def test_a_recurrent_teacher_and_student(
    make_project: MakeProject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They do not keep documents of a row apart, so each document has a row of its own, in both."""
    folder = tmp_path / "mamba"
    tokenizer = make_tokenizer(folder)
    mamba = next(each for each in ARCHITECTURES if each.kind == "mamba")
    make_teacher(mamba, folder, vocab_size=len(tokenizer.get_vocab()))
    few = {"max_train_windows": 6, "max_validation_windows": 2}
    teacher = {"model": str(folder), "backend": "hf"}
    project = load_project(
        make_project(teacher=teacher, prepare=few), ["distill.steps=1", "distill.interval_steps=1"]
    )
    cache_teacher(project)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = CacheReader(project.cache, 1.0).read("code", "train", 0)
    assert np.nanmax(np.abs(logprobs_alone(model, window) - window.label_logprobs)) <= STEP + 1e-5
    assert distill(project)["steps"] == 1
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "teacher: MambaForCausalLM does not keep documents of a row apart" in said
    assert "distill: MambaForCausalLM does not keep documents of a window apart" in said


def test_what_says_nothing_of_attention_was_of_windows(cached: Path) -> None:
    """Records of runs, and manifests in them, from before there was a choice."""
    settings = settings_in(load_project(cached))
    before = {name: value for name, value in settings.items() if name != "attention"}
    found = differences({"settings": before}, {"settings": settings})
    assert found == {"settings.attention": ("window", "document")}
    values = load_project(cached).manifest.model_dump()
    del values["attention"]
    assert recorded_manifest(values).attention == "window"
    assert load_project(cached).manifest.attention == "document"

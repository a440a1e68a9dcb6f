"""The cache as a torch dataset."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddk_pipe.pipeline.cache import CachedWindows, CacheReader, DomainBatches, collate
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing import DomainSampler
from ddk_pipe.pipeline.storage import open_folder


@pytest.fixture(scope="module")
def data(cached_output: Path) -> CachedWindows:
    return CachedWindows(cached_output / "cache")


def test_every_window_once_and_in_order(data: CachedWindows, cached_output: Path) -> None:
    reader = CacheReader(open_folder(cached_output / "cache"), 1.0)
    assert len(data) == sum(data.sizes) and data.domains == ["code", "plays"]
    for index in (0, data.sizes[0] - 1, data.sizes[0], len(data) - 1):
        domain, window = data.place(index)
        assert data.index(domain, window) == index
        read = reader.read(data.domains[domain], "train", window)
        example = data[index]
        assert example["domain"] == domain
        assert np.array_equal(example["input_ids"], read.tokens)
        assert torch.equal(example["targets"].ids, read.targets.ids)
    for outside in (-1, len(data)):
        with pytest.raises(IndexError):
            data[outside]


def test_loader_with_workers_gives_the_samplers_order(data: CachedWindows) -> None:
    order = DomainBatches(data, batch_windows=3, steps=4, seed=5)
    order.weights = np.array([0.25, 0.75])
    expected = DomainSampler(data.sizes, seed=5).draw_interval(np.array([0.25, 0.75]), 12)
    loader = DataLoader(data, batch_sampler=order, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert len(batches) == len(order) == 4
    assert torch.cat([batch["domain"] for batch in batches]).tolist() == expected[:, 0].tolist()
    first = data[data.index(*map(int, expected[0]))]
    assert torch.equal(batches[0]["input_ids"][0], first["input_ids"])
    assert batches[0]["targets"].positions == batches[0]["labels"].numel()


def test_state_continues_with_the_next_interval(data: CachedWindows) -> None:
    order = DomainBatches(data, batch_windows=2, steps=3, seed=1)
    list(order)
    state = json.loads(json.dumps(order.state_dict()))
    again = DomainBatches(data, batch_windows=2, steps=3, seed=1)
    again.load_state_dict(state)
    assert list(again) == list(order)
    with pytest.raises(DdkError, match="has seed 1, this run has 2"):
        DomainBatches(data, batch_windows=2, steps=3, seed=2).load_state_dict(state)


def test_pickled_without_its_open_files(data: CachedWindows) -> None:
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["input_ids"], data[3]["input_ids"])


def test_teacher_ce_and_refusals(data: CachedWindows, cached_output: Path, tmp_path: Path) -> None:
    validation = CachedWindows(cached_output / "cache", "validation", domains=["plays"])
    nats = torch.cat([validation[index]["teacher_logprobs"] for index in range(len(validation))])
    assert validation.teacher_ce()[0] == pytest.approx(-float(nats[~nats.isnan()].double().mean()))
    with pytest.raises(DdkError, match="no teacher cache"):
        CachedWindows(tmp_path)
    with pytest.raises(DdkError, match=r"temperature 2\.0 is not in the cache"):
        CachedWindows(cached_output / "cache", temperature=2.0)
    with pytest.raises(DdkError, match="no other/train"):
        CachedWindows(cached_output / "cache", domains=["other"])
    with pytest.raises(ValueError, match="at least 1"):
        DomainBatches(data, batch_windows=0, steps=1)

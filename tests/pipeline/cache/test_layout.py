from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import FIRST, SEQ_LEN, VOCAB, make_plan, make_spec, open_writer, window

from ddk_pipe.pipeline.cache import CacheReader, SplitSize
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.targets import NO_LABEL, select_logits
from ddk_pipe.pipeline.text import TRAIN, labels_of


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_positions_without_label_cost_no_entries(tmp_path: Path, scheme: str) -> None:
    plan = make_plan(scheme, temperatures=(1.0,))
    writer = open_writer(
        LocalFolder(tmp_path), make_spec(plan, domains={"code": {TRAIN: SplitSize(1, 4, "x")}})
    )
    (shard,) = writer.pending()
    tokens = np.zeros((1, SEQ_LEN), np.int64)
    nothing = select_logits(
        torch.randn(SEQ_LEN, VOCAB),
        torch.full((SEQ_LEN,), NO_LABEL),
        plan,
        torch.from_numpy(plan.uniforms("k", SEQ_LEN)),
    )
    record = writer.write(shard, tokens, np.zeros((1, SEQ_LEN), np.uint8), [nothing], {})
    assert (record.entries, record.positions) == (0, 0)
    assert not (CacheReader(writer.folder, 1.0).read("code", TRAIN, 0).targets.ids >= 0).any()


def test_a_label_the_teacher_thinks_impossible_stays_a_label(tmp_path: Path) -> None:
    writer = open_writer(LocalFolder(tmp_path), make_spec(make_plan()))
    tokens, masks, selected = zip(*(window(FIRST, n, writer.spec) for n in range(4)), strict=True)
    impossible = selected[1].label_logprobs.clone()
    at = int((~impossible.isnan()).nonzero()[0, 0])
    impossible[at] = float("-inf")
    changed = [selected[0], replace(selected[1], label_logprobs=impossible), *selected[2:]]
    writer.write(FIRST, np.stack(tokens), np.stack(masks), changed, {})
    got = CacheReader(writer.folder, 1.0).read("code", TRAIN, 1)
    assert np.array_equal(got.labels, labels_of(tokens[1], masks[1], no_label=NO_LABEL))
    assert got.label_logprobs[at] < -31
    with pytest.raises(ValueError, match="not those of the labels"):
        writer.write(FIRST, np.stack(tokens), np.ones_like(np.stack(masks)), changed, {})

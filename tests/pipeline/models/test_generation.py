"""Generation settings that transformers reads and refuses to save: left out by name, whatever is sound stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import be_quiet, mend_generation


def read(folder: Path, **values: Any) -> GenerationConfig:
    """As it is read beside weights, from a file."""
    be_quiet()
    (folder / "generation_config.json").write_text(json.dumps(values))
    config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    return config


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"do_sample": False, "top_k": 1}, ["top_k"]),
        ({"min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 1e-3}, ["epsilon_cutoff", "min_p", "typical_p"]),
        (
            {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
            ["early_stopping", "length_penalty"],
        ),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({"use_cache": False, "cache_implementation": "static"}, ["cache_implementation"]),
        ({"output_scores": True}, ["output_scores"]),
        ({"temperature": "warm"}, ["temperature"]),
        ({"do_sample": True, "temperature": 0.9, "top_p": 0.6, "top_k": 5}, []),
        ({"num_beams": 3, "early_stopping": True, "num_return_sequences": 2}, []),
        ({"eos_token_id": [1, 2], "max_new_tokens": 7}, []),
    ],
)
def test_what_says_nothing_is_left_out_and_the_rest_stays(
    tmp_path: Path, values: dict[str, Any], dropped: list[str]
) -> None:
    config = read(tmp_path, **values)
    assert sorted(mend_generation(config, field="student.model")) == dropped
    config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    for name, value in values.items():
        assert kept.get(name, value) == value and (name in kept) == (name not in dropped)


def test_settings_that_do_not_fit_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read(tmp_path, do_sample=True, temperature=0.5)

    def never(self: Any, strict: bool = False, **_: Any) -> None:
        if (self.temperature == 0.5 and self.do_sample and len(self.to_diff_dict()) > 2) or self is config:
            raise ValueError("they do not fit")

    monkeypatch.setattr(GenerationConfig, "validate", never)
    with pytest.raises(
        DdkError, match=r"student.model: transformers refuses .*they do not fit.*mend generation_config"
    ):
        mend_generation(config, field="student.model")

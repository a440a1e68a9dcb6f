from __future__ import annotations

import pytest

from ddk_pipe.pipeline.manifest import Domain, Manifest, Teacher
from ddk_pipe.pipeline.manifest.section import section_in


def test_values_never_change() -> None:
    manifest = Manifest(domains={"a": Domain(train=["a.jsonl"])}, teacher=Teacher(model="t"))
    with pytest.raises(ValueError, match="frozen"):
        manifest.seq_len = 3  # type: ignore[misc]


def test_sections_are_found_behind_their_fields() -> None:
    fields = Manifest.model_fields
    assert section_in(fields["teacher"].annotation) is Teacher
    assert section_in(fields["domains"].annotation) is Domain
    assert section_in(fields["seq_len"].annotation) is None

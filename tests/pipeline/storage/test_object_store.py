"""Object stores that cannot be reached, or are not there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import ObjectFolder, open_folder


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DDK_PIPE_RETRY_SECONDS", "0.3")
    place = ObjectFolder(s3_url)
    began = time.monotonic()
    attempts: list[Callable[[], object]] = [
        lambda: place.read("a"),
        lambda: place.create("a", b""),
        lambda: place.names(),
        lambda: place.files("a"),
        lambda: place.remove("a"),
        lambda: place.read_ranges("a", [(0, 1)]),
    ]
    for attempt in attempts:
        with pytest.raises(DdkError, match=f"{s3_url}.*check network and endpoint") as problem:
            attempt()
        assert "\n" not in str(problem.value) and len(str(problem.value)) < 600
    assert time.monotonic() - began < 20
    monkeypatch.setenv("DDK_PIPE_RETRY_SECONDS", "soon")
    with pytest.raises(DdkError, match="not a number of seconds"):
        ObjectFolder(s3_url)


def test_a_bucket_that_does_not_exist(s3_url: str) -> None:
    place = open_folder("s3://nobody-has-this/cache")
    assert not place.exists("cache.json")
    for attempt in (place.write, place.create):
        with pytest.raises(DdkError, match="no such bucket"):
            attempt("a", b"")

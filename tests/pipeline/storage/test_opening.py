"""Which address opens which folder."""

from __future__ import annotations

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder, open_folder


def test_addresses_of_another_kind() -> None:
    with pytest.raises(DdkError, match="unknown kind of address"):
        open_folder("ftp://somewhere/x")
    assert isinstance(open_folder("some/where"), LocalFolder)

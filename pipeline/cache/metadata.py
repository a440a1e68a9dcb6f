"""The zarr.json of the one kind of array that a shard has (`arrays`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def parse_width(content: bytes, windows: int, dtype: np.dtype[Any], *, name: str) -> int:
    """Width of the array that a zarr.json describes.

    Raises ValueError unless it is one of `windows` rows and of `dtype`, stored exactly as the module's docstring says.
    """
    try:
        found = json.loads(content)
        width = found["shape"][1]
        blosc = found["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        free = {"clevel": blosc["clevel"], "blocksize": blosc["blocksize"]}  # the writer's choice
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{name}: not the metadata of a sharded array") from None
    if type(width) is not int or any(type(value) is not int for value in free.values()):
        raise ValueError(f"{name}: not the metadata of a sharded array")
    wanted = _metadata(windows, width, dtype, free)
    found = {"attributes": {}, "storage_transformers": [], **found}
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        raise ValueError(f"{name}: {', '.join(different)} not as this program writes it")
    return width


def _metadata(windows: int, width: int, dtype: np.dtype[Any], free: dict[str, int]) -> dict[str, Any]:
    """The zarr.json of an array; `free` are the blosc settings that do not matter to a reader."""
    little, crc32c = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    values = little if dtype.itemsize > 1 else {"name": "bytes"}  # a byte has no order
    blosc = {"typesize": dtype.itemsize, "cname": "zstd", "shuffle": "shuffle", **free}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [windows, width],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [windows, width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, width],
                    "codecs": [values, {"name": "blosc", "configuration": blosc}, crc32c],
                    "index_codecs": [little, crc32c],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "storage_transformers": [],
    }

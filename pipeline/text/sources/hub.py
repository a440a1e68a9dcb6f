"""Hugging Face datasets: their rows, and the commit that they are."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, install_hint, reason
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project
from ddk_pipe.pipeline.text.sources.records import Document, read_record

COMMIT = re.compile(r"[0-9a-f]{40}")


def read_dataset(
    project: Project, source: DatasetSource, domain: Domain, *, field: str
) -> Iterator[Document]:
    """Every row, streamed; of the commit that `dataset_commit` names, where it names one."""
    datasets = _library(source, field=field)
    name = project.model(source.dataset, field=field)
    revision = source.revision if Path(name).is_dir() else dataset_commit(name, source.revision)
    try:
        rows = iter(
            datasets.load_dataset(
                name, source.config, split=source.split, revision=revision or source.revision, streaming=True
            )
        )
    except Exception as problem:  # noqa: BLE001 - the library raises dozens of kinds
        raise DdkError(
            f"{field}: dataset {source.dataset} cannot be opened ({reason(problem)})",
            hint="check id, config, split and network",
        ) from None
    number = 0
    while True:
        number += 1
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as problem:  # noqa: BLE001 - and while it reads
            raise DdkError(
                f"{field}: dataset {source.dataset}: row {number} cannot be read ({reason(problem)})",
                hint="check its files and the network",
            ) from None
        yield read_record(record, domain, f"{source.dataset}: row {number}", structs=True)


@functools.cache  # one answer a process: what is recorded is what is read
def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit on the hub that a revision (none: main) is now; what the local store holds where there is no network.

    None where nobody knows: no network, and never fetched into the store of huggingface_hub.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    try:
        sha = HfApi().dataset_info(name, revision=revision, timeout=10).sha
        return str(sha) if sha else None
    except Exception:  # noqa: BLE001 - no network, no such dataset, no permission: its reader says which
        folder = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs")
    try:
        held = (folder / (revision or constants.DEFAULT_REVISION)).read_text().strip()
    except (OSError, ValueError):
        return None
    return held if COMMIT.fullmatch(held) else None


def _library(source: DatasetSource, *, field: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DdkError(
            f"{field}: dataset {source.dataset} needs the package `datasets`",
            hint=install_hint("datasets"),
        ) from None
    return datasets

"""Documents of files, as a domain reads them: without a tokenizer or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.manifest import Domain, Manifest, Project
from ddk_pipe.pipeline.text import Document, documents


def project(root: Path) -> Project:
    """A project of one domain in that folder."""
    values = {"domains": {"d": {"train": ["x"]}}, "teacher": {"model": "m"}}
    return Project(Manifest.model_validate(values), root)


def read(root: Path, *sources: Any, **fields: Any) -> list[Document]:
    """The documents of the sources; `fields` of the domain, such as text_field."""
    domain = Domain.model_validate({"train": list(sources), **fields})
    return list(documents(project(root), domain, domain.train, field="domains.d.train"))


def texts(root: Path, *sources: Any, **fields: Any) -> list[str | None]:
    """Their text."""
    return [document.text for document in read(root, *sources, **fields)]

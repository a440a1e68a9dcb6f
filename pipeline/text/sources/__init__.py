"""Sources of text -> documents, streamed: never a whole corpus in memory.

A file is what it holds, not what it is called: compressions and formats are told by their first bytes, and the name
decides only between texts that look alike.
"""

from ddk_pipe.pipeline.text.sources.finding import find_files, resolve_sources
from ddk_pipe.pipeline.text.sources.hub import dataset_commit
from ddk_pipe.pipeline.text.sources.kinds import kind_by_name
from ddk_pipe.pipeline.text.sources.parts import Part, Stretch, cut_into_parts
from ddk_pipe.pipeline.text.sources.reading import documents, documents_of
from ddk_pipe.pipeline.text.sources.records import Document

__all__ = [
    "Document",
    "Part",
    "Stretch",
    "cut_into_parts",
    "dataset_commit",
    "documents",
    "documents_of",
    "find_files",
    "kind_by_name",
    "resolve_sources",
]

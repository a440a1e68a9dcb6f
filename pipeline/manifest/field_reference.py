"""The manifest explained: every field for `ddk-pipe schema` and the docs, and the file that `ddk-pipe init` writes."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ddk_pipe.pipeline.manifest.fields import Manifest
from ddk_pipe.pipeline.manifest.section import Section, section_in
from ddk_pipe.pipeline.manifest.text import DatasetSource

STARTER = """\
# ddk-pipe manifest. Paths are relative to this file. `ddk-pipe schema` lists every field.
output: out                       # tokens/, cache/ and distill/ go here

domains:                          # at least one; a name and where its text comes from
  notes:
    train: [text/notes.jsonl]     # one {"text": ...} a line; also .jsonl.gz, .jsonl.zst, .parquet, *.txt, a folder
  support_chat:
    train: [text/chats.jsonl]     # {"messages": [...]} a line: loss on the assistant's turns only
    # validation: [text/chats-validation.jsonl]   # without it 5% of the documents are set aside

teacher:
  model: path/to/teacher          # a folder with safetensors, or a Hugging Face id
  backend: auto                   # vllm where it is installed, else hf (transformers)

seq_len: 512                      # tokens per window; at most what teacher and student can take

cache:
  scheme: pps                     # unbiased; one knob:
  tau: 0.02                       # smaller: more bytes, less noise (0.05 about 15, 0.01 about 42 bytes/position)

student:
  keep_layers: [0, 2, 4, 6]       # start from these layers of the teacher; or `model:`, or `config:`

distill:
  steps: 500
  batch_tokens: 4096
  interval_steps: 50              # the domain weights are updated this often
  gamma: 0.2                      # loss = CE + gamma * KL
  mixing: ddk                     # or uniform, natural, doremi, ...
  optimizer: {learning_rate: 3.0e-4}
"""


def reference() -> Iterator[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, description), for `ddk-pipe schema` and the docs."""
    yield from _reference(Manifest, "")


def _reference(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        below = section_in(field.annotation)
        label = prefix + name
        if below is not None and below is not DatasetSource:
            inner = f"{label}.<name>." if "dict" in str(field.annotation) else f"{label}."
            if field.description:
                yield label, "section", "", field.description
            yield from _reference(below, inner)
            continue
        default = "required" if field.is_required() else str(field.default)
        yield label, _type_name(field.annotation), default, field.description or ""


def _type_name(annotation: Any) -> str:
    """A type as a reader of YAML thinks of it: "int", "a | b", "list[str]"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if annotation is type(None):
        return "null"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    return str(getattr(annotation, "__name__", annotation))

"""The model card: what the record knows of a student, and what only its maker can say (licence, languages, data)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import ddk_pipe
from ddk_pipe.stages.common import RunRecord, TableData, domain_rows, evaluation_tables

NOT_STATED = "Not stated by whoever exported this model."

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class CardOptions:
    """What is asked for and never guessed. None, or empty: the card says that it was not stated."""

    name: str | None = None  # none: the run's name
    licence: str | None = None  # as the hub writes it: apache-2.0, mit, other, ...
    languages: tuple[str, ...] = ()
    data: str | None = None  # where the text comes from, and under which terms
    teacher_licence: str | None = None


def card(run: RunRecord, options: CardOptions, dtype: str, record: dict[str, Any] | None = None) -> str:
    """README.md of the exported folder: YAML metadata and Markdown. No path of this machine is in it.

    `record` says what the student was made of (ddk_pipe.json, beside its weights); the metadata holds it too.
    """
    summary: dict[str, Any] = run.summary or {}
    manifest = summary.get("manifest", {})
    name = options.name or run.name
    teacher = manifest.get("teacher", {}).get("model")
    data = ModelCardData(
        license=options.licence,
        language=list(options.languages) or None,
        base_model=teacher if _is_hub_id(teacher) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "ddk-pipe"],
        **({"ddk_pipe": record} if record is not None else {}),
    )
    body = "\n\n".join(_sections(run, options, manifest, name, dtype))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").content)


def _is_hub_id(model: Any) -> bool:
    """True for "user/name", which no folder of this machine looks like unless it is written so."""
    return isinstance(model, str) and bool(HUB_ID.fullmatch(model)) and not Path(model).exists()


def _sections(
    run: RunRecord, options: CardOptions, manifest: dict[str, Any], name: str, dtype: str
) -> list[str]:
    summary: dict[str, Any] = run.summary or {}
    teacher = str(manifest.get("teacher", {}).get("model", "not recorded"))
    shown = teacher if _is_hub_id(teacher) else f"{PurePath(teacher).name} (a local folder)"
    options_of = manifest.get("distill", {})
    tuned = ("mixing", "gamma", "temperature", "alpha", "interval_steps", "steps", "batch_tokens", "seed")
    settings = ", ".join(f"{key} {options_of[key]}" for key in tuned if key in options_of)
    versions = ", ".join(f"{key} {value}" for key, value in summary.get("versions", {}).items())
    return [
        f"# {_text(name)}",
        (
            f"A language model of {summary.get('parameters', 0):,} parameters ({dtype}), distilled with"
            f" [ddk-pipe](https://pypi.org/project/ddk-pipe/) {ddk_pipe.__version__} from cached predictions of a teacher."
        ),
        (
            f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```'
        ),
        f"## Teacher\n\n{_text(shown)}. Licence of the teacher: {_text(options.teacher_licence or NOT_STATED)}",
        (
            f"## Data\n\n{_text(options.data or NOT_STATED)}\n\nDomains: {_text(', '.join(run.domains))}."
            f" {summary.get('tokens', 0):,} tokens of training in {summary.get('steps', 0):,} steps."
        ),
        f"## Licence\n\n{_text(options.licence or NOT_STATED)}",
        f"## Results\n\n{_markdown(domain_rows(run))}",
        *[f"{table.caption}:\n\n{_markdown(table)}" for table in evaluation_tables([run])],
        (
            f"## How it was made\n\n{_text(settings) or 'not recorded'}.\n\n- settings: `{_text(str(summary.get('settings', '')))}`"
            f"\n- cache: `{_text(str(summary.get('cache_fingerprint', '')))}`"
            f"\n- versions: {_text(versions)}"
        ),
    ]


def _markdown(table: TableData) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(
        "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _text(value: str) -> str:
    """What a user typed, as text in Markdown: one line, no HTML."""
    return " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")

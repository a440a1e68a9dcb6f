"""The tokenizer that a manifest names, with the chat template that it names."""

from __future__ import annotations

from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import load_tokenizer

FIELD = "prepare.chat_template"


def project_tokenizer(project: Project) -> Any:
    """The fast tokenizer of the project; raises DdkError if it or the template's file cannot be read."""
    tokenizer = load_tokenizer(
        project.tokenizer, field="tokenizer", trust_remote_code=project.manifest.teacher.trust_remote_code
    )
    named = project.manifest.prepare.chat_template
    if named is not None:
        tokenizer.chat_template = _template(project, named)
    return tokenizer


def _template(project: Project, named: str) -> str:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    path = project.path(named, field=FIELD)
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DdkError(f"{FIELD}: {path} is not UTF-8", hint="save it as UTF-8") from None
    except OSError as problem:
        raise DdkError(f"{FIELD}: {path} cannot be read ({problem.strerror})", hint="mend the path") from None
    try:
        render_jinja_template(conversations=[], chat_template=source)  # compiles it, renders nothing
    except TemplateSyntaxError as problem:
        raise DdkError(
            f"{FIELD}: {path}:{problem.lineno}: {problem.message}", hint="mend the template"
        ) from None
    return source

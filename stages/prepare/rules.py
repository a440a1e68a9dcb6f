"""By which rules text became ids, and by which it would now: as digests that are compared, and what they mean in words."""

from __future__ import annotations

from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.text import (
    TRAIN,
    Encoder,
    Split,
    chat_rules,
    project_tokenizer,
    text_rules,
    tokenizer_digest,
)

TEXT_RULES = "text_rules"
CHAT_RULES = "chat_rules"  # in the record of domains that hold chats
WORDS = {
    "tokenizer_digest": "the tokenizer's ids",
    TEXT_RULES: "how the tokenizer turns text into ids",
    CHAT_RULES: "the chat template or its day",
}


def encoder_now(project: Project) -> Encoder:
    """The project's encoder."""
    return Encoder(project_tokenizer(project), name=project.tokenizer, date=project.manifest.prepare.date)


def rules_now(project: Project) -> tuple[Encoder, dict[str, str]]:
    """The project's encoder and the digests of its rules, by the names in WORDS."""
    encoder = encoder_now(project)
    return encoder, {
        "tokenizer_digest": tokenizer_digest(encoder.tokenizer),
        TEXT_RULES: text_rules(encoder),
        CHAT_RULES: chat_rules(encoder),
    }


def rules_of(domain: dict[str, Split]) -> dict[str, str]:
    """The rules that a prepared domain was made by; those of chats only if it holds some."""
    record = domain[TRAIN].record
    return {name: record[name] for name in (TEXT_RULES, CHAT_RULES) if name in record}


def check_rules(project: Project, made_by: Any, *, what: str) -> None:
    """Raises DdkError if the project's tokenizer now works by other rules than those of `made_by`.

    `made_by`: {domain: `rules_of`}, from `what`, which may be a stranger's. Domains that it lacks are not compared.
    """
    rules = made_by if isinstance(made_by, dict) else {}
    then = {name: rules[name] for name in project.manifest.domains if isinstance(rules.get(name), dict)}
    if not then:
        return
    now = rules_now(project)[1]
    for domain, by in then.items():
        for name in (TEXT_RULES, CHAT_RULES):
            if name in by and by[name] != now[name]:
                raise DdkError(
                    f"tokenizer: {WORDS[name]} changed since {what} was made (domain {domain}); a student trained from it"
                    " would be saved with rules that it does not know",
                    hint=f"bring {project.tokenizer} back as it was, or run `ddk-pipe cache-teacher` again",
                )

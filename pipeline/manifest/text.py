"""What a manifest may say of its text: where it comes from, and how it becomes windows of tokens."""

from __future__ import annotations

import datetime
from typing import Any, Literal

import pydantic
from pydantic import Field

from ddk_pipe.pipeline.manifest.section import Fraction, Positive, Section

DEFAULT_DATE = "2024-07-26"  # the day that Llama's chat templates write where none is given

Attention = Literal["document", "window"]
Packing = Literal["stream", "whole"]


class DatasetSource(Section):
    """A Hugging Face dataset (needs the package `datasets`)."""

    dataset: str = Field(description="dataset id on the hub, or a local dataset folder")
    config: str | None = Field(None, description="the dataset's configuration, where it has several")
    split: str = Field("train", description="the dataset's split")
    revision: str | None = Field(None, description="git revision on the hub; pins the data")


Source = str | DatasetSource


class Domain(Section):
    """Where the text of one domain comes from."""

    train: list[Source] = Field(
        min_length=1,
        description="files, globs or folders (.jsonl, .parquet, .csv, .tsv, plain text, also packed), or datasets",
    )
    validation: list[Source] | None = Field(
        None, description="the same for validation; without it a share of the documents is set aside"
    )
    text_field: str = Field("text", description="the field of a record that holds the text")
    messages_field: str = Field(
        "messages", description="a record with this field is a chat: loss on the assistant's turns only"
    )
    tools_field: str | None = Field(
        "tools", description="the field of a chat's record that holds its tools; null: tools are left out"
    )
    packing: Packing | None = Field(
        None,
        description="stream: documents one after the other, cut where windows end; whole: those that fit in a window are"
        " not cut; none: whole for chats (under attention: document), stream for text",
    )

    @pydantic.field_validator("train", "validation", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value


class Prepare(Section):
    """How text becomes windows of tokens."""

    validation_fraction: Fraction = Field(
        0.05, description="share of a domain's documents set aside by their hash where no validation is named"
    )
    max_validation_windows: Positive = Field(64, description="windows per domain kept for validation")
    max_train_windows: Positive | None = Field(None, description="windows per domain for training; none: all")
    chat_template: str | None = Field(
        None,
        description="file of another chat template, which the student is saved with; none: the tokenizer's",
    )
    date: str = Field(
        DEFAULT_DATE, description="the day that chat templates which write today's date write (YYYY-MM-DD)"
    )

    @pydantic.field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: Any) -> Any:
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value.isoformat()  # YAML reads an unquoted day as one
        if isinstance(value, str) and _is_day(value):
            return value
        raise ValueError("a day is written YYYY-MM-DD")


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False

"""The chat in a record -> messages and tools as chat templates take them, whatever file it came from.

A null field is an absent one: Arrow has every field of every record, null or not, and templates ask whether a field is
there. Content in parts is its text. What no template can show is refused by file and row.
"""

from __future__ import annotations

import json
from typing import Any

from ddk_pipe.pipeline.errors import DdkError

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
SAYS = ("content", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")
ARGUMENTS = "arguments"  # of a call: a null in them is a value


def read_chat(messages: Any, tools: Any, where: str, *, field: str, structs: bool) -> Chat:
    """Messages and tools (None: none) of a record at `where`; raises DdkError for what is no chat.

    `structs`: the record comes from Arrow, where null means absent at every depth; in JSON that is so of a message's own
    fields and of its calls, not of their arguments.
    """
    try:
        return _messages(messages, where, field, structs=structs), _tools(tools, where, structs=structs)
    except RecursionError:
        raise DdkError(f"{where}: {field} is nested too deeply", hint="mend or drop it") from None


def _messages(messages: Any, where: str, field: str, *, structs: bool) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise DdkError(
            f"{where}: {field} is not a list of role and content",
            hint='write [{"role": "user", "content": "..."}, ...]',
        )
    return [
        _message(_present(message, structs=structs), f"{where}: message {number}")
        for number, message in enumerate(messages, 1)
    ]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not message.get("tool_calls", True):  # an empty list: no calls
        message = {name: value for name, value in message.items() if name != "tool_calls"}
    if not any(name in message for name in SAYS):
        raise DdkError(f"{where} has no content", hint="mend or drop the chat")
    if "content" in message:
        return {**message, "content": _text(message["content"], where)}
    return message


def _text(content: Any, where: str) -> str:
    """Content as text; parts follow one another without anything between."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DdkError(
            f"{where}: its content is neither text nor a list of parts", hint="mend or drop the chat"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DdkError(
                f"{where} holds a part that is no text ({kind})", hint="only text is distilled: drop the chat"
            )
        texts.append(text)
    return "".join(texts)


def _tools(tools: Any, where: str, *, structs: bool) -> list[dict[str, Any]] | None:
    """Tools as a list of objects; they come as one, or as the JSON text of one or of each."""
    tools = _parsed(tools, where)
    if not tools:
        return None
    tools = [_parsed(tool, where) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DdkError(
            f"{where}: its tools are not a list of objects", hint="mend them, or set tools_field: null"
        )
    return [_without_null(tool) for tool in tools] if structs else tools


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError:
        raise DdkError(
            f"{where}: its tools are not JSON", hint="mend them, or set tools_field: null"
        ) from None


def _present(message: dict[str, Any], *, structs: bool) -> dict[str, Any]:
    """The message without its null fields."""
    if structs:
        return dict(_without_null(message))
    return {name: _calls(value) if name == "tool_calls" else value for name, value in _kept(message).items()}


def _calls(calls: Any) -> Any:
    """Tool calls without null fields; arguments stay as they are."""
    if isinstance(calls, list):
        return [_calls(call) for call in calls]
    if isinstance(calls, dict):
        return {name: value if name == ARGUMENTS else _calls(value) for name, value in _kept(calls).items()}
    return calls


def _kept(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}


def _without_null(value: Any) -> Any:
    """The value without null fields at any depth."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in _kept(value).items()}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value

"""YAML that loses nothing: no key twice, and no name that YAML takes for something else."""

from __future__ import annotations

from typing import Any

import yaml

from ddk_pipe.pipeline.errors import DdkError, reason

MERGE = "tag:yaml.org,2002:merge"  # `<<`, which brings in the keys of another mapping
FREE = "config"  # below it stands what is not ours, whose keys may be numbers: a transformers configuration


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text, by safe_load's rules. `name` begins the line of every error.

    Raises DdkError, naming the line, for what is not YAML, for a key that a mapping has twice (safe_load keeps the
    last one), and for a key that is no text (`no` is false, `2024-01-01` a day), except below a key `config`.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Checks(loader, name).look(node, free=False)
        return loader.construct_document(node)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        what = getattr(problem, "problem", None) or "not YAML"
        raise DdkError(f"{name}:{line} {what}", hint="mend the YAML there") from None
    except RecursionError:
        raise DdkError(f"{name}: YAML that nests too deep", hint="flatten it") from None


class _Checks:
    """A walk over the nodes, before anchors and merges make them values."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader = loader
        self.name = name
        self.seen: set[int] = set()  # an anchor's node is met again at every alias
        self.around: set[int] = set()  # the nodes that hold the one looked at

    def look(self, node: yaml.Node, *, free: bool) -> None:
        if id(node) in self.around:
            raise DdkError(f"{self.name}: an anchor that holds itself", hint="write out what it stands for")
        if id(node) in self.seen:
            return
        self.seen.add(id(node))
        self.around.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._keys(node, free=free)
            for key, value in node.value:
                self.look(value, free=free or key.value == FREE)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.look(item, free=free)
        else:
            self._value(node)
        self.around.remove(id(node))

    def _keys(self, node: yaml.MappingNode, *, free: bool) -> None:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            value, line = self._value(key), key.start_mark.line + 1
            if not (isinstance(value, str) or free):
                kind = "nothing" if value is None else f"{type(value).__name__} {value}"
                raise DdkError(
                    f"{self.name}: line {line}: the key {key.value or '(empty)'} is no name: YAML reads it as {kind}",
                    hint=f'write it in quotes: "{key.value}"',
                )
            if value in lines:
                raise DdkError(
                    f"{self.name}: line {line}: the key {key.value} is there twice (first on line {lines[value]})",
                    hint="remove or rename one of them",
                )
            lines[value] = line

    def _value(self, node: yaml.Node) -> Any:
        """A scalar's value; what looks like a day or a number and is none, or is too long for one, is said."""
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError) as problem:
            raise DdkError(
                f"{self.name}: line {node.start_mark.line + 1}: {node.value[:40]} cannot be read"
                f" ({reason(problem)[:80]})",
                hint="write it in quotes, or mend it",
            ) from None

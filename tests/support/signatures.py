"""Signatures as text, read from the sources and not from what is imported.

So they read the same on every version of Python, and neither torch nor triton is needed.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "src"
PROTOCOLS = {
    "__init__",
    "__call__",
    "__contains__",
    "__enter__",
    "__exit__",
    "__getitem__",
    "__iter__",
    "__len__",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = tuple[str, ast.AST]  # a function, a class or the value of a name, and the module where it is defined


def signatures(promised: Iterable[str]) -> Iterator[str]:
    """A line or more for each dotted name and, under bare names, for what stands in these lines: types that are handed
    back, the values of aliases and constants. Raises LookupError for a name that is not defined in our sources."""
    items = {label: definition(*label.rsplit(".", 1)) for label in promised}
    for module, node in list(items.values()):
        for name, found in _named(module, [part.returns for part in _functions(node)]):
            if isinstance(found[1], ast.ClassDef) and found not in items.values():
                items[name] = found
    for label, (module, node) in items.items():
        yield from lines_of(label, module, node)
        for name, (_, inner) in _named(module, _written_beside(node)):
            if isinstance(inner, ast.expr):
                yield f"{name} = {ast.unparse(inner)}"


def handed_out(room: str) -> list[str]:
    """`__all__` of a module."""
    names: list[str] = ast.literal_eval(definition(room, "__all__")[1])
    return names


def lines_of(label: str, module: str, node: ast.AST) -> Iterator[str]:
    """A function; or a class: how it is made, and its public methods, properties and attributes."""
    if isinstance(node, Function):
        yield label + _signature(node)
    elif isinstance(node, ast.ClassDef):
        yield label + _constructor(node)
        yield from _members(label, module, node)
    else:
        yield label


def definition(module: str, name: str) -> Found:
    """Where the name is defined, through all `from ... import`; raises LookupError if it is nowhere in our sources."""
    found = look_up(module, name)
    if found is None:
        raise LookupError(f"{module}.{name} is not defined in our sources")
    return found


def look_up(module: str, name: str) -> Found | None:
    """The same; None where there is none."""
    for node in _top_level(module):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and (value := _assigned(node).get(name)):
            return module, value
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddk_pipe"):
            there = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), None)
            if there is not None and (node.module, there) != (module, name):  # else a module of that name
                return look_up(str(node.module), there)
    return None


def _assigned(node: ast.Assign | ast.AnnAssign) -> dict[str, ast.expr | None]:
    """Name: value, also of `A, B = 1, 2`."""
    values: dict[str, ast.expr | None] = {}
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
            values |= {ast.unparse(part): value for part, value in pairs}
        values[ast.unparse(target)] = node.value
    return values


@functools.cache
def _top_level(module: str) -> list[ast.stmt]:
    """The statements of a module, those under an `if` too."""
    path = SOURCES.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    return [inner for node in tree.body for inner in [node, *(node.body if isinstance(node, ast.If) else [])]]


def _constructor(node: ast.ClassDef) -> str:
    """By __init__, or by the fields of a dataclass, named tuple or typed dict."""
    for part in node.body:
        if isinstance(part, Function) and part.name == "__init__":
            return _signature(part, method=True, returns=False)
    return f"({', '.join(map(ast.unparse, _fields_of(node)))})"


def _members(label: str, module: str, node: ast.ClassDef) -> Iterator[str]:
    for _, (home, base) in _named(module, node.bases):  # ours too: a method may move there
        if isinstance(base, ast.ClassDef):
            yield from _members(label, home, base)
    for part in _functions(node):
        how = [ast.unparse(decorator) for decorator in part.decorator_list]
        if part.name == "__init__":
            yield from (f"{label}.{name}" for name in _attributes(part))
        elif any(name.endswith("property") for name in how):
            yield f"{label}.{part.name}: {ast.unparse(part.returns) if part.returns else 'Any'}"
        elif f"{part.name}.setter" in how:
            yield f"{label}.{part.name}: may be set"
        else:
            kind = "".join(f"@{name} " for name in how if name in ("classmethod", "staticmethod"))
            yield kind + f"{label}.{part.name}" + _signature(part, method="staticmethod" not in how)


def _functions(node: ast.AST) -> list[Function]:
    """The function, or the public methods of the class with its __init__."""
    if isinstance(node, Function):
        return [node]
    methods = [part for part in getattr(node, "body", []) if isinstance(part, Function)]
    return [part for part in methods if part.name in PROTOCOLS or not part.name.startswith("_")]


def _fields_of(node: ast.AST) -> list[ast.AnnAssign]:
    """The annotated public fields of a class, in their order."""
    fields = [part for part in getattr(node, "body", []) if isinstance(part, ast.AnnAssign)]
    return [field for field in fields if not ast.unparse(field.target).startswith("_")]


def _written_beside(node: ast.AST) -> Iterator[ast.AST | None]:
    """The annotations and defaults of a function, or of a class's public methods and fields."""
    for function in _functions(node):
        yield from (function.args, function.returns)
    for field in _fields_of(node):
        yield from (field.annotation, field.value)


def _attributes(init: Function) -> Iterator[str]:
    attributes = [node for node in ast.walk(init) if isinstance(node, ast.Attribute)]
    for node in attributes:
        if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self" and node.attr[0] != "_":
            yield node.attr


def _signature(node: Function, *, method: bool = False, returns: bool = True) -> str:
    """As written, without the self or cls of a method."""
    arguments = copy.copy(node.args)
    if method:
        arguments.args = arguments.args[1:]
    arrow = f" -> {ast.unparse(node.returns)}" if returns and node.returns else ""
    return f"({ast.unparse(arguments)}){arrow}"


def _named(module: str, parts: Iterable[ast.AST | None]) -> Iterator[tuple[str, Found]]:
    """The names in these annotations and defaults that our sources define, with their definitions."""
    nodes = [node for part in parts if part for node in ast.walk(part)]
    for name in sorted({node.id for node in nodes if isinstance(node, ast.Name)}):
        if found := look_up(module, name):
            yield name, found

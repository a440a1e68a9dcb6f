"""docs/reliability.md lists every fault of this folder, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_fault_is_documented() -> None:
    tests = {
        f"{path.stem.removeprefix('test_')}: {node.name.removeprefix('test_')}"
        for path in HERE.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and path != Path(__file__)
    }
    listed = re.findall(r"`(\w+: \w+)` \|$", TEXT, re.MULTILINE)
    assert len(listed) == len(set(listed)), "listed twice"
    assert set(listed) == tests


def test_every_kind_of_damage_is_documented() -> None:
    """Also those that are parameters of one test, by the names they have there."""
    tree = ast.parse((HERE / "test_damage.py").read_text(encoding="utf-8"))
    kinds = {
        node.target.id: [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Dict)
    }
    (shards,) = re.findall(r"^Shards: (.*?)\.\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert " ".join(shards.split()).split("; ") == kinds["SHARDS"]
    assert f"| rank table {', '.join(map(str, kinds['TABLES']))} |" in TEXT

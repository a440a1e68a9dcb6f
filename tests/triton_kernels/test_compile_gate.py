"""Every launch that ships compiles for every target without a spill, and takes what its table says.

No GPU is used: the compiler decides registers, spills and shared memory. Half a second a variant, next to
nothing where triton's cache has it. `python -P -m ddk_pipe.triton_kernels.compile_gate` checks the rarer variants, too.

There is a table for each version of triton that was tried. Under any other all must compile and nothing spill
just the same; only its registers and shared memory are compared with nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import ddk_pipe.triton_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)

FOLDER = Path(ddk_pipe.triton_kernels.__file__).with_name("compile_gate") / "tables"
TABLES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
TILES = ("tail_lse", "chunk_gradient")


def name_of(variant: dict[str, Any]) -> str:
    stages = "" if variant["stages"] is None else f"s{variant['stages']}"
    constants = "-".join(f"{name}={value}" for name, value in variant["constants"].items())
    return "-".join(
        [variant["kernel"], variant["target"], variant["dtype"], f"w{variant['warps']}{stages}", constants]
    )


def common(version: str) -> dict[str, dict[str, Any]]:
    """The rows of what runs as a rule, and of the known spillers, which the tests compile; the rest is for main()."""
    return {name_of(row["variant"]): row for row in TABLES[version]["rows"] if not row["variant"]["rare"]}


INSTALLED = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
# Of whatever version: all tables list the same.
VARIANTS = {name: row["variant"] for name, row in common(min(TABLES)).items()}
every_table = pytest.mark.parametrize("version", TABLES)


@functools.cache
def gate_run() -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """The gate's own process, where no TRITON_INTERPRET forbids compiling, and the rows it wrote. Run once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        gate = ["-m", "ddk_pipe.triton_kernels.compile_gate", "--common", "--json", str(path)]
        command = [sys.executable, "-P", "-W", "error", *gate]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return done, {name_of(row["variant"]): row for row in rows}


def measured(name: str) -> dict[str, Any]:
    done, rows = gate_run()
    assert name in rows, done.stderr or "the table has a variant that does not ship"
    return rows[name]


@pytest.mark.slow
def test_the_gate_is_open() -> None:
    done, _ = gate_run()
    assert done.returncode == 0, done.stdout + done.stderr


@every_table
def test_the_table_lists_what_ships(version: str) -> None:
    _, rows = gate_run()
    assert rows.keys() == common(version).keys(), (
        "run `python -P -m ddk_pipe.triton_kernels.compile_gate --write`"
    )


@every_table
def test_the_table_is_named_after_its_compiler(version: str) -> None:
    assert TABLES[version]["triton"] == version


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant["must_spill"]])
def test_no_spill(name: str) -> None:
    assert measured(name)["spill_bytes"] == 0


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant["must_spill"]])
def test_known_spiller_spills(name: str) -> None:
    assert measured(name)["spill_bytes"] > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_resources_are_those_of_the_table(name: str) -> None:
    if INSTALLED not in TABLES:
        pytest.skip(f"registers depend on the compiler: no table of triton {INSTALLED}, only of {[*TABLES]}")
    assert measured(name) == common(INSTALLED)[name]


@every_table
def test_every_row_of_the_table_spills_only_if_it_must(version: str) -> None:
    """The rare variants, as they were when the table was written."""
    rows = TABLES[version]["rows"]
    assert not [r for r in rows if bool(r["spill_bytes"]) != r["variant"]["must_spill"]]
    assert len(rows) > len(VARIANTS)


@every_table
@pytest.mark.parametrize("kernel", ["sparse_kl_rows", *TILES, "put_ids"])
def test_every_kernel_ships_on_every_target_in_every_dtype(kernel: str, version: str) -> None:
    rows = [r["variant"] for r in TABLES[version]["rows"] if r["variant"]["kernel"] == kernel]
    assert len({(v["target"], v["dtype"]) for v in rows if not v["must_spill"]}) == 12


@every_table
@pytest.mark.parametrize("kernel", ["sparse_kl_rows", *TILES, "put_ids"])
def test_tuning_has_two_to_four_launches_to_choose_from(kernel: str, version: str) -> None:
    """For every target, dtype and number of lanes; the first in the code is the default."""
    launches: dict[tuple[Any, ...], set[str]] = {}
    for v in (row["variant"] for row in TABLES[version]["rows"] if row["variant"]["kernel"] == kernel):
        if v["aligned"] and not v["must_spill"] and v["constants"].get("GRADIENT", True):
            constants = v["constants"]
            group = (v["target"], v["dtype"], constants.get("T_IS_1"), constants.get("KEPT"))
            launches.setdefault(group, set()).add(name_of(v))
    assert {len(found) for found in launches.values()} <= {2, 3, 4}


def test_a_tile_known_to_spill_is_kept_for_both_compilers() -> None:
    spillers = [variant for variant in VARIANTS.values() if variant["must_spill"]]
    assert {v["target"][:3] for v in spillers if v["kernel"] in TILES} == {"sm_", "gfx"}


def test_complaints_name_a_spill_a_lost_spill_too_much_shared_memory_too_many_threads_and_idle_matrix_units() -> (
    None
):
    from ddk_pipe.triton_kernels.compile_gate import Row, complaints, row_kernel, tile_kernel
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import Launch

    good = row_kernel("sm_90", "bf16", 256, 4096, 8, temperature_1=True)
    spiller = row_kernel("gfx942", "bf16", 256, 65536, 4, temperature_1=True, must_spill=True)
    tile = tile_kernel("tail_lse", "sm_90", "bf16", Launch(128, 128, 64, 8, 3), temperature_1=True)
    assert complaints([Row(good, 64, 0, 32, 0), Row(spiller, 512, 900, 32, 0), Row(tile, 99, 0, 32, 4)]) == []
    assert "spills 8 bytes" in complaints([Row(good, 128, 8, 32, 0)])[0]
    assert "no longer spills" in complaints([Row(spiller, 512, 0, 32, 0)])[0]
    assert "65537 bytes of shared memory" in complaints([Row(spiller, 512, 900, 65537, 0)])[0]
    wide = row_kernel("gfx942", "bf16", 256, 4096, 32, temperature_1=True)
    assert "2048 threads" in complaints([Row(wide, 32, 0, 32, 0)])[0]
    assert "without matrix instructions" in complaints([Row(tile, 99, 0, 32, 0)])[0]

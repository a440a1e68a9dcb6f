"""The commands about students: distill, sweep, evaluate, export. Heavy imports stand inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddk_pipe.stages.cli.arguments import (
    DEFAULT_MANIFEST,
    ManifestArgument,
    Overrides,
    checked_project,
    prepare_machine,
)


def distill(
    manifest: ManifestArgument = DEFAULT_MANIFEST,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the manifest and say what would be done; loads nothing")
    ] = False,
) -> None:
    """Train a student from the cache; the teacher is not needed any more. Continues where it stopped.

    \b
    Example:
      ddk-pipe distill manifest.yaml
      ddk-pipe distill manifest.yaml --dry-run
      torchrun --nproc-per-node 8 --no-python ddk-pipe distill manifest.yaml --set distill.parallel=fsdp
      ddk-pipe distill manifest.yaml --set distill.name=uniform --set distill.mixing=uniform
    """
    if dry_run:
        from ddk_pipe.pipeline.manifest import load_project
        from ddk_pipe.stages.cli.dry_run import describe

        for line in describe(load_project(manifest, overrides)):
            typer.echo(f"distill: {line}")
        return
    project = checked_project(manifest, overrides)
    from ddk_pipe.stages.distill import distill as run

    run(project)


def sweep(
    file: Annotated[Path, typer.Argument(help="the sweep file (YAML)")],
    parallel: Annotated[
        int | None, typer.Option(help="runs at once; ray: as many as there is room for if left out")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (RAY_ADDRESS names the cluster)")] = "local",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each run; its share of the cores if left out")
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="say how its runs stand, and start nothing")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be run")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before more than 200 runs")] = False,
) -> None:
    """Train many students from one cache: a grid or a list of changes to a manifest, over seeds.

    Finished runs are not repeated, a failed one does not stop the others. No teacher is loaded. Results in
    OUTPUT/sweeps/NAME/results.parquet, the students in OUTPUT/distill/.

    \b
    The file:
      manifest: manifest.yaml
      set: {distill.steps: 500}
      grid: {distill.mixing: [ddk, uniform], distill.gamma: [0.2, 1.0]}
      seeds: [0, 1, 2]
      stop_early: {after: 0.3}      (optional: the median rule)
      search: {trials: 20, space: {distill.gamma: {low: 0, high: 1}}}      (in place of grid; needs the extra optuna)

    \b
    Example:
      ddk-pipe sweep sweep.yaml
      ddk-pipe sweep sweep.yaml --parallel 4
      ddk-pipe sweep sweep.yaml --status; ddk-pipe report out/sweeps/sweep
    """
    from ddk_pipe.stages import sweep as stage

    if status:
        stage.status(file)
        return
    prepare_machine()
    stage.sweep(file, stage.Request(parallel, engine, threads, yes, dry_run))


def evaluate(
    student: Annotated[Path, typer.Argument(help="the folder of a run, or any model folder")],
    cache: Annotated[
        str | None, typer.Option(help="the cache to evaluate by; the run's own if left out")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="validation windows per domain; all if left out")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="tasks of lm-eval, separated by commas (needs the extra eval)")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="folder with task files of your own; needs no network")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples per task")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON too")] = False,
) -> None:
    """Measure a student: per domain perplexity, bits/byte, agreement with the teacher and calibration; lm-eval's tasks.

    The first four come from the cached validation windows: no teacher is loaded. A run keeps what was found, and its
    report shows it.

    \b
    Example:
      ddk-pipe evaluate out/distill/student
      ddk-pipe evaluate out/distill/student --tasks my_questions --task-folder tasks
      ddk-pipe evaluate some/model --cache out/cache --json
    """
    prepare_machine()
    from ddk_pipe.stages import evaluate as stage

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    found = stage.evaluate(student, stage.Request(cache, windows, names, task_folder, limit, device))
    if as_json:
        typer.echo(stage.to_text(found))


def export(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run")],
    to: Annotated[Path, typer.Option(help="the folder to write")],
    name: Annotated[str | None, typer.Option(help="the model's name; the run's if left out")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", "--licence", help="of the student: apache-2.0, mit, other, ...")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="en, de, ...; may be repeated")] = None,
    data: Annotated[str | None, typer.Option(help="where the text comes from, and under which terms")] = None,
    teacher_licence: Annotated[
        str | None, typer.Option("--teacher-license", "--teacher-licence", help="of the teacher")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    push: Annotated[str | None, typer.Option(help="USER/NAME on the Hugging Face hub; private")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: for everyone to see")] = False,
) -> None:
    """Write a run's student as a model folder to give away, with a model card filled from the record.

    What the record cannot know (licences, languages, data) is asked for and never guessed: the card says "not stated".

    \b
    Example:
      ddk-pipe export out/distill/student --to my-student --license apache-2.0 --language en
      ddk-pipe export out/distill/student --to my-student --license mit --push me/my-student
    """
    prepare_machine()
    from ddk_pipe.stages.export import CardOptions, Target
    from ddk_pipe.stages.export import export as write

    options = CardOptions(name, licence, tuple(language or ()), data, teacher_licence)
    write(run, Target(to, dtype, push, public), options)

"""The commands about many students: sweep, report, evaluate, export. Heavy imports stand inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


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
    from ddk_pipe.stages.common import prepare_cpu

    prepare_cpu()
    stage.sweep(file, stage.Request(parallel, engine, threads, yes, dry_run))


def report(
    place: Annotated[Path, typer.Argument(help="the folder of a run or of a sweep, or the sweep file")],
    kind: Annotated[
        str, typer.Option("--format", help="html, or png or svg: every picture as a file")
    ] = "html",
    out: Annotated[
        Path | None, typer.Option(help="the page, or the folder of the pictures; in PLACE if left out")
    ] = None,
) -> None:
    """Show a run or a sweep: text here, and one self-contained HTML page. Also while it is unfinished.

    \b
    Example:
      ddk-pipe report out/distill/student
      ddk-pipe report sweep.yaml
      ddk-pipe report out/sweeps/sweep --format png --out pictures
    """
    from ddk_pipe.stages.report import report as run

    run(place, kind=kind, out=out)


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
    from ddk_pipe.stages.common import prepare_cpu

    prepare_cpu()
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
    from ddk_pipe.stages.common import prepare_cpu

    prepare_cpu()
    from ddk_pipe.stages.export import CardOptions, Target
    from ddk_pipe.stages.export import export as write

    options = CardOptions(name, licence, tuple(language or ()), data, teacher_licence)
    write(run, Target(to, dtype, push, public), options)


COMMANDS: dict[str, Callable[..., None]] = {
    "sweep": sweep,
    "report": report,
    "evaluate": evaluate,
    "export": export,
}

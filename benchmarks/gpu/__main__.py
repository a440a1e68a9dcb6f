"""The loss, a whole training step and the teacher on one GPU, each against what nobody can do without.

    PYTHONPATH=benchmarks python -m gpu [loss] [step] [teacher] [--out benchmarks/results/gpu] [--peers DIR]

Each part takes minutes, needs no file and no network (models and text are drawn at random), and writes PART.json.
Where there is no CUDA device the JSON says so. `--device cpu` runs the same at toy sizes, to try the programs
themselves; its figures mean nothing and no goal is judged.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from ddk_pipe.stages.common import prepare_cpu

PARTS = ("loss", "step", "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="a folder with other packages' losses, searched last")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    prepare_cpu()
    for part in options.parts or PARTS:
        path = options.out / f"{part}.json" if options.out else None
        import_module(f"gpu.{part}").run(options.device, path, rounds=options.rounds, peers=options.peers)


if __name__ == "__main__":
    main()

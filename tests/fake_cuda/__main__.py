"""Prints what the runs find: ``python -m tests.fake_cuda [--grid] [--details] [TEXT ...]``.

TEXT chooses the runs whose names have it; ``--details`` also prints host syncs, launches and what the peak is made of.
"""

from __future__ import annotations

import argparse

from megatron_ee.testing.examples import MODELS

from . import report
from .cases import fitting_grid, inference_grid, tuning_grid
from .checks import problems
from .runs import MODES, Case, Fitting, Inference, Tuning
from .worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_cuda", description=__doc__)
    parser.add_argument("--grid", action="store_true", help="the whole grid, not the example configurations alone")
    parser.add_argument("--details", action="store_true")
    parser.add_argument("text", nargs="*")
    arguments = parser.parse_args()
    cases: list[Case] = [*tuning_grid(), *fitting_grid(), *inference_grid()]
    if not arguments.grid:
        cases = [*(Tuning(name, -1) for name in MODELS)]
        cases += [Fitting(name) for name in MODELS]
        cases += [Inference(name, mode) for name in MODELS for mode in MODES]
    print(report.HEADER)
    with Worker() as worker:
        for case in cases:
            if not all(text in case.name for text in arguments.text):
                continue
            result = worker.run(case)
            print(report.line(result), flush=True)
            if arguments.details:
                again = worker.run(case, explained=result.peak)
                print(report.details(again), flush=True)
            for line in problems(result):
                print(f"    {line}", flush=True)


if __name__ == "__main__":
    main()

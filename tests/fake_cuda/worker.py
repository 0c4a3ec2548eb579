"""Runs cases in a process of its own, into which the shim is loaded before torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from . import shim
from .runs import Case, Fitting, Inference, Result, Tuning

Fault = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a context that spoils the package while a case runs; a function of a module, for it is sent by its name."""


class Worker(contextlib.AbstractContextManager["Worker"]):
    """One process for many cases."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)

    def run(self, case: Case, *, fault: Fault = contextlib.nullcontext, explained: int | None = None) -> Result:
        """Run a case.

        Raises:
            RuntimeError: it raised, with its traceback.
        """
        return self._pool.submit(_run, case, fault, explained).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start() -> None:
    shim.load()
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")


def _run(case: Case, fault: Fault, explained: int | None) -> Result:
    from . import fit, infer, tune

    try:
        with fault():
            match case:
                case Tuning():
                    return tune.run(case, explained)
                case Fitting():
                    return fit.run(case, explained)
                case Inference():
                    return infer.run(case, explained)
    except Exception:  # errors of fake tensors cannot be sent to another process
        raise RuntimeError(traceback.format_exc()) from None

"""What to run, and what came of it: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

MODES = ("full", "threshold", "speculative")


@dataclass(frozen=True)
class Tuning:
    """Two steps of an example configuration on one rank.

    Attributes:
        example: directory under ``examples``.
        rank: of all processes; negative ones count from the last.
        processes: of the run; None for as many as the example starts.
        overrides: of the configuration, as on the command line.
        microbatches: of one data-parallel replica in a step: enough to fill, run and drain the stages.
        window: sliding window that the model is given.
        model: one of ``testing.examples.OTHER_MODELS`` in place of the example's.
    """

    example: str
    rank: int = 0
    processes: int | None = None
    overrides: tuple[str, ...] = ()
    microbatches: int = 2
    window: int | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """Distinguishes it from other cases."""
        return _named("tune", self.model or self.example, *self.overrides, rank=self.rank, window=self.window)


@dataclass(frozen=True)
class Fitting:
    """The closed-form fit of an example configuration on one rank, one exit at a time.

    Attributes:
        example: directory under ``examples``.
        rank: of all processes; negative ones count from the last.
        processes: of the run; None for as many as the example starts.
        overrides: of the configuration, as on the command line.
        microbatches: of one data-parallel replica that are fitted on, and measured on.
    """

    example: str
    rank: int = 0
    processes: int | None = None
    overrides: tuple[str, ...] = ()
    microbatches: int = 1

    @property
    def name(self) -> str:
        """Distinguishes it from other cases."""
        return _named("fit", self.example, *self.overrides, rank=self.rank)


@dataclass(frozen=True)
class Inference:
    """Requests to an engine of an example configuration's model and exits, on the first rank.

    Attributes:
        example: directory under ``examples``.
        mode: as in ``Request``.
        overrides: of the configuration, as on the command line; the exits and the tensor-parallel size are its.
        rows: requests at a time.
        tokens: that each emits.
        sampled: draw tokens; otherwise take the most probable one.
        window: sliding window that the model is given.
        gates: the exits have gates, which decide in threshold mode.
    """

    example: str
    mode: str
    overrides: tuple[str, ...] = ()
    rows: int = 1
    tokens: int = 4
    sampled: bool = False
    window: int | None = None
    gates: bool = False

    @property
    def name(self) -> str:
        """Distinguishes it from other cases."""
        kinds = [kind for kind in ("sampled", "gates") if getattr(self, kind)]
        return _named("infer", self.example, self.mode, *kinds, *self.overrides, rows=self.rows, window=self.window)


Case = Tuning | Fitting | Inference


def _named(*words: str, **numbers: int | None) -> str:
    return " ".join([*words, *(f"{name} {number}" for name, number in numbers.items() if number is not None)])


@dataclass(frozen=True)
class Result:
    """What one rank did.

    Attributes:
        name: the case's.
        where: the rank among all, and its place in the layout.
        planned: bytes by the package's own plan.
        activations: those of them that are activations and taps.
        peak: bytes at most.
        launches: kernels and collectives of a step, of a fit, or of all requests.
        syncs: waits of the host for the device meanwhile, by place in the package and kind.
        units: how many there were of each unit that the list of host syncs counts by.
        attention: calls by backend.
        faults: tensors on wrong devices.
        launches_by_place: the places in the package that launch most.
        composition: bytes at the peak by place, where that was asked for.
        planned_for_another: whether the plan is of a rank that holds more.
        sent: bytes that the rank sent in the step, and those planned: to other stages, to tensor-parallel and to
            data-parallel ranks; empty for inference.
    """

    name: str
    where: str
    planned: int
    peak: int
    launches: int
    syncs: dict[tuple[str, str], int]
    units: dict[str, int]
    attention: dict[str, int]
    faults: tuple[str, ...]
    launches_by_place: dict[str, int]
    composition: dict[str, int] = field(default_factory=dict)
    planned_for_another: bool = False
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    activations: int = 0

    @property
    def off(self) -> float:
        """How much more than planned is held at most, as a share."""
        return self.peak / self.planned - 1

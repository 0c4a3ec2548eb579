"""Prints an estimate and a search, and turns them into JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ee.planning.devices import DISK, FRAGMENTATION, GB, HOST_RESERVED, RESERVED
from megatron_ee.planning.estimate import Estimate
from megatron_ee.planning.search import Candidate, Limits, Misfit, Search
from megatron_ee.planning.table import memory_parts, memory_phases, print_plan
from megatron_ee.tables import add_columns, counted, new_table

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_MISFITS = 6


def print_estimate(estimate: Estimate, limits: Limits | None, per_hour: float | None, console: Console) -> None:
    """Print the run as it is written; ``limits``: of memory, if known; ``per_hour``: price of a GPU, if known."""
    arch, config, device = estimate.architecture, estimate.config, estimate.machine
    where = f" on {estimate.gpus} x {device.name}" if device is not None else f" on {counted(estimate.gpus, 'GPU')}"
    _say(
        console,
        f"{arch.family}, {counted(arch.num_layers, 'layer')}, {counted(len(estimate.specs), 'exit')}, "
        f"{config.model.dtype}{where}; steps of {config.tuning.global_batch_size} x {config.data.sequence_length} "
        f"tokens, micro-batch {config.tuning.micro_batch_size}",
    )
    print_plan(estimate.plan, console)
    for line in _fit_lines(estimate, limits):
        _say(console, line)
    _print_traffic(estimate, console)
    if estimate.step is not None:
        _print_step(estimate, console)
        _print_phases(estimate, per_hour, console)
    disk = estimate.disk
    _say(
        console,
        f"Disk: {counted(disk.checkpoints, 'checkpoint')} of {disk.checkpoint / GB:,.2f} GB, "
        f"{counted(disk.adapters, 'adapter')} of {disk.adapter / GB:,.2f} GB, {disk.cache / GB:,.2f} GB of cache; "
        f"at most {disk.most / GB:,.1f} GB at a time.",
    )
    for line in basis(estimate, limits):
        _say(console, f"- {line}")


def basis(estimate: Estimate, limits: Limits | None) -> list[str]:
    """What each estimate rests on."""
    of_host = ""
    if estimate.shares_memory:
        of_host = "; it is the memory that tensors are in, so it counts there"
    elif limits is None or limits.host is None:
        of_host = "; not compared, since the host's memory is unknown: name it with --host-memory"
    lines = [
        "memory: counted tensors at their peak; simulated steps without a GPU stay within 5% of it",
        f"what a GPU needs: the largest phase, {FRAGMENTATION:.0%} more for gaps of the allocator (assumed), and "
        f"{RESERVED / GB:g} GB for CUDA and libraries (assumed)",
        f"what a host needs: streamed layers, an optimizer there, checkpoints while they are written, and "
        f"{HOST_RESERVED / GB:g} GB for Python and libraries in each process (assumed){of_host}",
        "FLOPs: counted products of matrices; other operations are in the share of the peak that is reached",
        "traffic: counted, reductions as a ring",
    ]
    if estimate.machine is not None:
        lines += [f"time: {line}" for line in estimate.machine.basis]
        lines.append(f"storage that reads and writes {DISK / GB:g} GB/s (assumed)")
    lines.append("data: corpora are not read; they are taken to have the tokens that fit and validation ask for")
    return lines


def print_search(found: Search, gpus: int, limits: Limits, per_hour: float | None, console: Console) -> None:
    """Print the best ways to run the configuration, and why others do not fit."""
    size = f"{gpus} x {limits.gpu / GB:,.4g} GB"
    if limits.host is not None:
        size += f" in hosts of {limits.host / GB:,.4g} GB"
    if found.best:
        table = new_table(f"Best of what fits {size}", console)
        add_columns(table, "#", "tensor", "pipeline", "data", "micro-batch")
        add_columns(table, "layers", words=True)
        add_columns(table, "GB needed", "host GB")
        timed = found.best[0].estimate.step is not None
        if timed:
            add_columns(table, "s per step", "hours", *(["price"] if per_hour is not None else []))
        for number, each in enumerate(found.best, start=1):
            table.add_row(str(number), *_row(each, timed, per_hour))
        console.print(table)
        for number, each in enumerate(found.best, start=1):
            notes = "; ".join(_notes(each))
            _say(console, f"{number}: {' '.join(each.arguments) or 'as written'}" + (f"  ({notes})" if notes else ""))
    else:
        _say(console, f"Nothing fits {size}.")
    for misfit in found.misfits[:SHOWN_MISFITS]:
        _say(console, f"tensor {misfit.tensor} x pipeline {misfit.pipeline}: {_why(misfit)}")
    if len(found.misfits) > SHOWN_MISFITS:
        _say(console, f"and {len(found.misfits) - SHOWN_MISFITS} other sizes; --json has all of them")


def report_dict(
    estimate: Estimate | None, found: Search | None, limits: Limits | None, per_hour: float | None
) -> dict[str, Any]:
    """Everything in types of JSON; bytes, FLOPs and seconds. ``estimate``: of the run as it is written, if possible."""
    return {
        "run": None if estimate is None else _estimate_dict(estimate, limits, per_hour),
        "gpu_memory": None if limits is None else limits.gpu,
        "host_memory": None if limits is None else limits.host,
        "best": None if found is None else [_candidate_dict(each, limits, per_hour) for each in found.best],
        "misfits": None if found is None else [_misfit_dict(each) for each in found.misfits],
        "basis": [] if estimate is None else basis(estimate, limits),
    }


def _fit_lines(estimate: Estimate, limits: Limits | None) -> list[str]:
    """What a GPU and a host need, and have."""
    gpu, host = (None, None) if limits is None else (limits.gpu, limits.host)
    if estimate.shares_memory:
        return [_fit_line("A process needs", estimate.needed, gpu)]
    of_host = f"The host of {estimate.processes} processes needs" if estimate.processes > 1 else "The host needs"
    return [_fit_line("A GPU needs", estimate.needed, gpu), _fit_line(of_host, estimate.host_needed, host)]


def _fit_line(who: str, needed: float, memory: float | None) -> str:
    line = f"{who} {needed / GB:,.1f} GB."
    if memory is None:
        return line
    if needed <= memory:
        return f"{line} It has {memory / GB:,.4g} GB."
    return f"{line} It has {memory / GB:,.4g} GB: short by {(needed - memory) / GB:,.1f} GB."


def _notes(candidate: Candidate) -> list[str]:
    """How the result differs from that of the configuration as it is written."""
    notes = ["trains no heads"] if candidate.less else []
    if candidate.rounded:
        notes.append(f"other hidden states: layers rounded to {candidate.rounded}, so agreement differs")
    return notes


def _say(console: Console, line: str) -> None:
    """Print a line that is not cut where no terminal is."""
    console.print(line, soft_wrap=True)


def _print_traffic(estimate: Estimate, console: Console) -> None:
    if estimate.gpus == 1:
        return
    table = new_table("GB that each rank sends per step", console)
    add_columns(table, "stage", words=True)
    add_columns(table, "to other stages", "tensor-parallel", "data-parallel")
    for index, each in enumerate(estimate.traffic):
        table.add_row(str(index), *(f"{size / GB:,.3f}" for size in each.per_step(estimate.workload.microbatches)))
    console.print(table)


def _print_step(estimate: Estimate, console: Console) -> None:
    step = estimate.step
    assert step is not None
    tokens = estimate.config.tuning.global_batch_size * estimate.workload.sequence_length
    table = new_table(f"Step: {step.seconds:.3g} s, {tokens / step.seconds:,.0f} tokens/s; seconds by stage", console)
    add_columns(table, "stage", words=True)
    add_columns(table, "layers", "exits", "tensor-parallel", "gradients", "update")
    for index, each in enumerate(step.stages):
        parts = (each.layers, each.exits, each.tensor, each.gradients, each.update)
        table.add_row(str(index), *(f"{seconds:.3g}" for seconds in parts))
    console.print(table)


def _print_phases(estimate: Estimate, per_hour: float | None, console: Console) -> None:
    run = estimate.run
    assert run is not None
    table = new_table("Run", console)
    add_columns(table, "phase", "amount", words=True)
    add_columns(table, "time")
    for phase in run.phases:
        table.add_row(phase.name, phase.amount, duration(phase.seconds))
    console.print(table)
    parts = [f"{duration(run.seconds)} in all", f"{estimate.gpus * run.seconds / 3600:,.1f} GPU hours"]
    if estimate.kilowatt_hours is not None:
        parts.append(f"{estimate.kilowatt_hours:,.1f} kWh")
    if per_hour is not None:
        parts.append(f"price {estimate.price(per_hour):,.2f}")
    _say(console, f"{', '.join(parts)}. --resume takes {duration(run.resume)} before its first step.")


def duration(seconds: float) -> str:
    """Such as ``3.2 h``, with the unit that suits."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _row(candidate: Candidate, timed: bool, per_hour: float | None) -> list[str]:
    estimate = candidate.estimate
    workload = estimate.workload
    sizes = (workload.tensor, len(estimate.layout.stages), workload.data, workload.micro_batch_size)
    row = [*map(str, sizes), _layers(estimate), f"{estimate.needed / GB:,.1f}", f"{estimate.host_needed / GB:,.1f}"]
    if timed and estimate.step is not None and estimate.run is not None:
        row += [f"{estimate.step.seconds:.3g}", f"{estimate.run.seconds / 3600:,.1f}"]
        row += [f"{estimate.price(per_hour):,.2f}"] if per_hour is not None else []
    return row


def _layers(estimate: Estimate) -> str:
    """Where the layers are, and how: ``device``, ``host``, ``int8`` and so on."""
    model, workload = estimate.config.model, estimate.workload
    if workload.residency != "device" or not workload.packed_bits:
        return workload.residency
    return model.quantise if model.quantise != "none" else "packed"


def _why(misfit: Misfit) -> str:
    if not misfit.short:
        return misfit.reason
    line = f"short by {misfit.short / GB:,.1f} GB{' of host memory' if misfit.host else ''}: {misfit.reason}"
    return f"{line}; {_remedy(misfit)}" if misfit.remedy else line


def _remedy(misfit: Misfit) -> str:
    """The remedy without the numbers of exits: ``head: shared`` fits."""
    assert misfit.remedy is not None
    changes = misfit.remedy
    if rounds := "model.quantise" in changes:  # and stay packed on the device, which are the defaults
        changes = {key: changes[key] for key in changes if key not in ("model.weights", "model.residency")}
    short = {f"{_key(key)}: {_plain(value)}" for key, value in changes.items()}
    fits = " with ".join(sorted(f"`{each}`" for each in short)) + " fits"
    return f"{fits}, with other hidden states" if rounds else fits


def _plain(value: Any) -> str:
    """As in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(key: str) -> str:
    return key.rpartition(".")[2] if key.startswith("exits.") else key


def _estimate_dict(estimate: Estimate, limits: Limits | None, per_hour: float | None) -> dict[str, Any]:
    plan, run, step, workload = estimate.plan, estimate.run, estimate.step, estimate.workload
    stages = []
    for index, (stage, traffic) in enumerate(zip(plan.stages, estimate.traffic, strict=True)):
        between, tensor, data = traffic.per_step(plan.microbatches)
        found: dict[str, Any] = {
            "layers": [stage.layers[0], stage.layers[-1]] if stage.layers else [],
            "exits": list(stage.exits),
            "frozen_parameters": stage.frozen_parameters,
            "trained_parameters": stage.trained_parameters,
            "memory": memory_parts(stage.memory),
            "phases": memory_phases(stage.memory),
            "flops_per_step": stage.flops,
            "idle": stage.idle,
            "bytes_per_step": {"stages": between, "tensor": tensor, "data": data},
        }
        if step is not None:
            found["seconds"] = vars(step.stages[index])
        stages.append(found)
    return {
        "gpus": estimate.gpus,
        "gpu": None if estimate.machine is None else estimate.machine.name,
        "tensor": plan.tensor,
        "pipeline": len(plan.stages),
        "data": plan.data,
        "sequence": workload.sequence_parallel,
        "microbatches": plan.microbatches,
        "micro_batch_size": workload.micro_batch_size,
        "stages": stages,
        "memory_planned": estimate.memory,
        "memory_needed": estimate.needed,
        "host_memory": vars(estimate.host),
        "host_memory_needed": estimate.host_needed,
        "fits": None if limits is None else limits.hold(estimate),
        "disk": {**vars(estimate.disk), "most": estimate.disk.most},
        "step_seconds": None if step is None else step.seconds,
        "phases": None if run is None else [vars(phase) for phase in run.phases],
        "seconds": None if run is None else run.seconds,
        "resume_seconds": None if run is None else run.resume,
        "kilowatt_hours": estimate.kilowatt_hours,
        "price": None if per_hour is None else estimate.price(per_hour),
    }


def _candidate_dict(candidate: Candidate, limits: Limits | None, per_hour: float | None) -> dict[str, Any]:
    return {
        "overrides": candidate.changes,
        "arguments": candidate.arguments,
        "trains_less": candidate.less,
        "changes_hidden_states": bool(candidate.rounded),
        **_estimate_dict(candidate.estimate, limits, per_hour),
    }


def _misfit_dict(misfit: Misfit) -> dict[str, Any]:
    return {**vars(misfit), "text": _why(misfit)}

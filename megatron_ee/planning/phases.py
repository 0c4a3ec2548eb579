"""How long a whole run takes on a machine, phase by phase. Pure: no process group is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.exits.fit import (
    CANDIDATES,
    HELD_OUT_MOST,
    MEMORY_SHARE,
    PER_FEATURE,
    RIDGES,
    TRIALS,
    fit_bytes,
    number_turns,
)
from megatron_ee.exits.gate import RIDGES as GATE_RIDGES
from megatron_ee.exits.gate import STEPS as NEWTON_STEPS
from megatron_ee.exits.registry import body_of
from megatron_ee.parallel.costs import attention_flops, final_exit_flops, mlp_flops
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.planning.activations import by_layer
from megatron_ee.planning.costs import exit_forward_flops
from megatron_ee.planning.devices import DISK, GB
from megatron_ee.planning.machine import Machine, group_link
from megatron_ee.planning.memory import frozen_bytes
from megatron_ee.planning.parameters import hosted_by, layer_bytes, layer_parameters, stage_parameters
from megatron_ee.planning.plan import StageWork, schedule_end
from megatron_ee.planning.step_time import StepTime, expanding_seconds, streaming_seconds
from megatron_ee.planning.storage import disk_use, gate_tokens, saves
from megatron_ee.planning.traffic import stage_traffic
from megatron_ee.planning.workload import Workload
from megatron_ee.tables import counted


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: what is done.
        amount: how much of it.
        seconds: of all of it.
    """

    name: str
    amount: str
    seconds: float


@dataclass(frozen=True)
class RunTime:
    """All phases of a run that is not interrupted, and the seconds that ``--resume`` takes before the next step."""

    phases: tuple[Phase, ...]
    resume: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)


def run_time(
    config: RunConfig,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    layout: Layout,
    workload: Workload,
    machine: Machine,
    step: StepTime,
) -> RunTime:
    """Estimate the run of a checked configuration, its exits' ``init`` resolved."""
    run = _Run(config, architecture, tuple(specs), layout, workload, machine)
    steps, phases = config.tuning.steps, [run.load()]
    if workload.validates:
        phases.append(run.final_exit())
    if any(spec.init == "fit" for spec in specs):
        phases.append(run.fit())
    phases.append(Phase("tuning", f"{steps:,} steps of {step.seconds:.3g} s", steps * step.seconds))
    if workload.validates:
        phases.append(run.validations())
    gated, taught = any(spec.gate for spec in specs), workload.top_k > 0
    if gated and taught:
        phases.append(run.gates_while_tuning())
    phases.append(run.saving())
    if gated and not taught:
        phases.append(run.gates())
    if run.decodes_after or workload.free_running:
        phases.append(run.decoding())
    checkpoint = disk_use(config, architecture, specs, workload).checkpoint
    return RunTime(tuple(phases), (run.tuned() + checkpoint) / DISK)


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    architecture: Architecture
    specs: tuple[ExitSpec, ...]
    layout: Layout
    workload: Workload
    machine: Machine

    def load(self) -> Phase:
        """Before the first run the backbone is hashed. All layers are read before tuning, for validation and the fit,
        and after it, for gates and threshold mode; those that are tuned in between, unless all stay loaded."""
        arch, workload = self.architecture, self.workload
        before = workload.validates or any(spec.init == "fit" for spec in self.specs)
        after = (any(spec.gate for spec in self.specs) and not workload.top_k) or self.decodes_after
        passes = 2 if workload.free_running else 1 + before + after
        whole = stage_parameters(even_layout(arch.num_layers, 1), 0, arch, (), distillation=True)[0]
        size = passes * self._stored(whole, arch.num_layers) + (0 if workload.free_running else self.tuned())
        return Phase("hash and load the backbone", f"{size / GB:,.1f} GB", size / DISK)

    def tuned(self) -> int:
        """Bytes of the frozen weights of all ranks while tuning, as they are stored."""
        taught, tensor = self.workload.top_k > 0, self.workload.tensor
        counts = (
            stage_parameters(self.layout, index, self.architecture, self.specs, tensor, taught)[0]
            for index in range(len(self.layout.stages))
        )
        return self._stored(sum(counts) * tensor, sum(len(stage.layers) for stage in self.layout.stages))

    def _stored(self, frozen: int, layers: int) -> int:
        """Bytes on disk of so many frozen parameters, ``layers`` among them, which may be quantised there."""
        arch, itemsize = self.architecture, self.workload.itemsize
        saved = layer_parameters(arch) * itemsize - layer_bytes(arch, itemsize, arch.packed_bits)
        return frozen * itemsize - layers * saved

    def final_exit(self) -> Phase:
        """On the validation data; and the continuations of prompts, each token of which reads all weights."""
        settings, workload = self.config.validation, self.workload
        sequences, prompts = settings.sequences, settings.acceptance.prompts
        seconds = self._all_layers(sequences * workload.sequence_length)
        amount = counted(sequences, "sequence")
        if prompts:
            seconds += self._continuations()
            amount += f", {counted(prompts, 'prompt')}"
        return Phase("all layers for validation", amount, seconds)

    def decoding(self) -> Phase:
        """Free-running threshold mode, as slow as the full model at worst: in every validation, or once at the end."""
        times = self.times if self.workload.free_running else 1
        amount = f"{counted(times, 'time')}, {counted(self.config.validation.acceptance.prompts, 'prompt')}"
        return Phase("threshold mode", amount, times * self._continuations())

    @property
    def decodes_after(self) -> bool:
        """Whether threshold mode is measured after the last step."""
        workload = self.workload
        return workload.decodes and not workload.free_running and workload.residency != "disk"

    @property
    def times(self) -> int:
        """Number of validations: before the first step, at each interval, and after the last step."""
        steps, interval = self.config.tuning.steps, self.config.validation.interval
        return 1 + (-(-steps // interval) if interval else bool(steps))

    def _continuations(self) -> float:
        """Seconds in which the full model continues the prompts: each token reads all weights, and expands packed
        ones."""
        workload, whole = self.workload, even_layout(self.architecture.num_layers, 1)
        frozen, _ = stage_parameters(whole, 0, self.architecture, (), workload.tensor, distillation=True)
        reading = frozen * workload.itemsize / self.machine.bandwidth + self._expanded(self.architecture.num_layers)
        return self.config.validation.acceptance.tokens * max(reading, self._streamed())

    def fit(self) -> Phase:
        """Each turn runs all tokens through all layers, and held-out ones for each trial.

        Sums are float32 products, solving them float64 ones.
        """
        arch, workload, machine = self.architecture, self.workload, self.machine
        fitted = [spec for spec in self.specs if spec.init == "fit"]
        wanted = PER_FEATURE * arch.ffn_size if self.config.fit.tokens == "auto" else self.config.fit.tokens
        batch = self.config.tuning.global_batch_size * workload.sequence_length
        tokens = math.ceil(wanted / batch) * batch
        stages = self.layout.of_all(arch.num_layers).with_exits([spec.layer for spec in self.specs])
        ridges = len(RIDGES) if self.config.fit.ridge else 1
        turns, busiest = 0, 0.0
        for index, stage in enumerate(stages.stages):
            own = [body_of(spec).fitted_rows(arch) or 0 for spec in hosted_by(stage, fitted)]
            frozen, trained = stage_parameters(stages, index, arch, self.specs, workload.tensor, distillation=True)
            held = frozen_bytes(frozen, stage, arch, workload) + trained * workload.itemsize
            free = int(MEMORY_SHARE * (machine.memory - held))
            needed = [fit_bytes(rows, arch.hidden_size, workload.tensor) for rows in own]
            turns = max(turns, 1 + max(number_turns(needed, free), default=-1))
            sums = sum(2 * rows * (rows + 2 * arch.hidden_size) for rows in own) * tokens / workload.data
            solving = sum(ridges * (rows**3 / 3 + 4 * rows**2 * arch.hidden_size) for rows in own)
            busiest = max(busiest, sums / workload.tensor / machine.float32 + solving / machine.float64)
        each = sum(exit_forward_flops(arch, spec, 1, workload.tensor) for spec in fitted)
        forward = turns * (self._all_layers(tokens) + TRIALS * self._all_layers(HELD_OUT_MOST))
        measured = self._spread(CANDIDATES * HELD_OUT_MOST * each)
        turn = f" in {turns} turns" if turns > 1 else ""
        return Phase("fit", f"{counted(len(fitted), 'exit')}, {tokens:,} tokens{turn}", forward + busiest + measured)

    def validations(self) -> Phase:
        """Before the first step, at each interval, and after the last step."""
        count = self.times
        workload, machine, arch = self.workload, self.machine, self.architecture
        rounds = math.ceil(self.config.validation.sequences / (workload.data * workload.micro_batch_size))
        link = group_link(machine, workload.tensor, 1)
        work = []
        for index, stage in enumerate(self.layout.stages):
            layers = sum(_layer_flops(arch, layer, workload.sequence_length) for layer in stage.layers)
            exits = sum(
                exit_forward_flops(arch, spec, workload.sequence_length, workload.tensor)
                for spec in hosted_by(stage, self.specs)
            )
            traffic = stage_traffic(self.layout, index, arch, self.specs, workload)
            ranks = workload.tensor / workload.micro_batch_size
            forward = layers / ranks / machine.layers + traffic.layers / link
            forward += self._expanded(len(stage.layers)) / self._together
            work.append(StageWork(forward, 0.0, exits / ranks / machine.exits))
        seconds = schedule_end(self.layout, work, rounds)
        layers = sum(len(stage.layers) for stage in self.layout.stages)
        reading = streaming_seconds(layers, arch, workload, machine)
        seconds = max(seconds, -(-rounds // workload.microbatches) * reading)
        amount = f"{counted(count, 'time')}, {counted(self.config.validation.sequences, 'sequence')}"
        return Phase("validation", amount, count * seconds)

    def saving(self) -> Phase:
        """Steps wait for a copy to host memory, and the run for the last checkpoint."""
        use, count = disk_use(self.config, self.architecture, self.specs, self.workload), saves(self.config)
        size = use.checkpoint
        ranks = self.workload.tensor * self.workload.data * len(self.layout.stages)
        copied = size / ranks / self.machine.host_link if self.config.checkpoint.asynchronous else size / DISK
        amount = f"{counted(count, 'checkpoint')} of {size / GB:,.1f} GB"
        return Phase("saving", amount, (count - 1) * copied + size / DISK)

    def gates(self) -> Phase:
        """After tuning, of the last and the best adapter, in one pass through all layers."""
        gated, adapters = sum(spec.gate for spec in self.specs), self.workload.adapters
        return Phase("gates", f"{gated} in {counted(adapters, 'adapter')}", self._fit_gates(adapters))

    def gates_while_tuning(self) -> Phase:
        """Before each validation and each save; before the first step if its exits may be the best."""
        steps, config = self.config.tuning.steps, self.config
        intervals = (config.validation.interval if self.workload.validates else 0, config.checkpoint.interval)
        due = {steps}.union(*(range(interval, steps, interval) for interval in intervals if interval))
        if self.workload.validates and any(spec.init == "fit" for spec in self.specs):
            due.add(0)
        gated = sum(spec.gate for spec in self.specs)
        return Phase("gates", f"{gated}, {counted(len(due), 'time')}", len(due) * self._fit_gates(1))

    def _fit_gates(self, adapters: int) -> float:
        """Seconds of all layers, and for each adapter heads and Newton steps in float64."""
        arch, workload = self.architecture, self.workload
        gated, tokens = [spec for spec in self.specs if spec.gate], gate_tokens(self.config, arch)
        heads = sum(exit_forward_flops(arch, spec, 1, workload.tensor) for spec in gated)
        newton = len(gated) * len(GATE_RIDGES) * NEWTON_STEPS * 2 * arch.hidden_size**2 * tokens
        solving = newton / workload.data / len(self.layout.stages) / self.machine.float64
        return self._all_layers(tokens) + adapters * (self._spread(tokens * heads) + solving)

    def _all_layers(self, tokens: int) -> float:
        """Seconds of a pass of ``tokens`` through all layers, spread evenly, with the final exit."""
        arch, workload = self.architecture, self.workload
        length = workload.sequence_length
        flops = sum(_layer_flops(arch, layer, length) for layer in range(1, arch.num_layers + 1))
        flops += final_exit_flops(arch, length, workload.tensor)
        stages = len(self.layout.stages)
        rounds = math.ceil(tokens / (workload.data * workload.tokens))
        each = flops * workload.micro_batch_size / (workload.tensor * stages * self.machine.layers)
        each += self._expanded(arch.num_layers) / stages / self._together
        return max((rounds + stages - 1) * each, -(-rounds // workload.microbatches) * self._streamed())

    def _streamed(self) -> float:
        """Seconds of streaming all layers once; 0 if they stay on the device."""
        return streaming_seconds(self.architecture.num_layers, self.architecture, self.workload, self.machine)

    def _expanded(self, layers: int) -> float:
        """Seconds of expanding so many layers once; 0 if they are not packed."""
        return expanding_seconds(layers, self.architecture, self.workload, self.machine)

    @property
    def _together(self) -> int:
        """Microbatches that pass a layer before the next one is expanded."""
        return self.workload.microbatches if by_layer(self.layout, self.workload) else 1

    def _spread(self, flops: float) -> float:
        """Seconds of FLOPs of exits that are spread over all devices."""
        ranks = self.workload.tensor * self.workload.data * len(self.layout.stages)
        return flops / ranks / self.machine.exits


def _layer_flops(architecture: Architecture, layer: int, tokens: int) -> int:
    return attention_flops(architecture, layer, tokens) + mlp_flops(architecture, tokens)

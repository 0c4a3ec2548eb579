"""Data parallelism and AdamW for the exits' parameters, with megatron-core's classes.

Each exit has its own wrapper. One backward per microbatch then completes the exit's gradients, and their reduction
overlaps with the work of other exits. The backbone has no wrapper, and so no gradient, buffer or optimizer state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.config.schema import OptimizerConfig, ScheduleConfig
from megatron_ee.parallel.adam import (
    adam_class,
    adam_steps,
    inside_megatron,
    prepare_adam,
    pull_to_initial,
    set_adam_steps,
)
from megatron_ee.parallel.core_versions import gather_no_weights
from megatron_ee.parallel.decay import initial_values
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.host_adam import HostAdam
from megatron_ee.parallel.host_gradients import HostGradients, Shard

with platform.quiet_imports():
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


NORM_RUN = 2**22
"""Elements per float32 partial norm. Partial norms are added in float64, so no whole gradient is copied."""


@dataclass(frozen=True)
class ParameterState:
    """Optimizer state of one trained parameter on this rank.

    Attributes:
        parameter: the model's own.
        start: first element of the flattened parameter that this data-parallel rank updates.
        stop: end of this range.
        tensors: flat float32 tensors of this range: ``exp_avg``, ``exp_avg_sq`` and, if the model's weights are not
            float32, the main weights as ``main``, or as ``remainder`` (int16, see ``split_adam``). With weight decay
            towards the initial values also these as ``initial``, in the weights' dtype.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


class ExitOptimizer:
    """Gradient buffers, reduction, clipping, AdamW and learning-rate schedule of the exits on this stage."""

    def __init__(
        self,
        exits: Sequence[nn.Module],
        config: TransformerConfig,
        groups: Groups,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        steps: int,
    ) -> None:
        """Wrap the trained parameters of ``exits``. Parameters without ``requires_grad`` are left out.

        Their current weights are the initial values for weight decay towards these.
        """
        trained = [exit_ for exit_ in exits if any(p.requires_grad for p in exit_.parameters())]
        if not trained:
            trained = [nn.Module()]  # megatron-core's optimizer needs a module, even on a stage without exits
        self.groups, self._clip = groups, optimizer.clip_grad
        platform.return_freed_memory(config.hidden_size)
        base = torch.optim.Optimizer
        platform.without_compiler(base.add_param_group, base.zero_grad, base.state_dict, base.load_state_dict)
        towards_initial = optimizer.decay_towards == "initial"
        weight_decay = 0.0 if towards_initial else optimizer.weight_decay  # megatron-core's and Adam's own
        chosen = adam_class(optimizer.implementation, config.params_dtype)
        data_parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=groups.data.size() > 1,
            use_distributed_optimizer=True,
        )
        with platform.translated():
            self.wrappers = {
                exit_: DistributedDataParallel(config, data_parallel, exit_, pg_collection=groups.collection)
                for exit_ in trained
            }
            if groups.data.size() == 1:
                for wrapper in self.wrappers.values():
                    gather_no_weights(wrapper)
            core = CoreOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                weight_decay=weight_decay,
                clip_grad=0.0,  # see step
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            )
            with inside_megatron(chosen, core), platform.quiet_imports():  # it imports models of all kinds
                self.optimizer = get_megatron_optimizer(
                    core,
                    list(self.wrappers.values()),
                    config_overrides=get_standard_config_overrides(core),
                    use_gloo_process_groups=False,
                )
        for adam in self._adams():
            prepare_adam(adam, config.params_dtype, optimizer.weight_decay if towards_initial else 0.0)
        for buffer in (buffer for wrapper in self.wrappers.values() for buffer in wrapper.buffers):
            # If possible, this frees the gradient's memory between the update and its exit's next backward.
            buffer.reset = functools.partial(platform.zero_, buffer.grad_data)
        self._on_host = self._host_gradients()
        self._norms: dict[nn.Module, Tensor] = {}
        self.scheduler = _scheduler(self.optimizer, optimizer, weight_decay, schedule, max(1, steps))

    def _adams(self) -> Iterator[torch.optim.Optimizer]:
        """The inner optimizers: none on a stage that trains nothing."""
        return (part.optimizer for part in self.optimizer.chained_optimizers if part.optimizer is not None)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step, also on a stage that trains nothing."""
        return float(self.scheduler.get_lr({}))

    def _host_gradients(self) -> dict[nn.Module, HostGradients]:
        """By exit, its gradients; empty where the optimizer's state is on the device."""
        found: dict[nn.Module, HostGradients] = {}
        for exit_, wrapper in self.wrappers.items():
            own = set(exit_.parameters())
            for part in self.optimizer.chained_optimizers:
                if isinstance(part.optimizer, HostAdam):
                    shards = [shard for shard in _shards(part) if shard.parameter in own]
                    found[exit_] = HostGradients(wrapper, shards, part.optimizer)
        return found

    def zero_gradients(self) -> None:
        """Zero all gradients, before the first backward of a step."""
        for wrapper in self.wrappers.values():
            wrapper.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._norms.clear()

    def begin(self, exit_: nn.Module) -> None:
        """Allocate the gradients of an exit, before its first backward of a step; further calls do nothing."""
        if exit_ in self._on_host:
            self._on_host[exit_].begin()

    def finish(self, exit_: nn.Module) -> None:
        """Move the gradients of an exit to host memory, if the optimizer is there, after its last backward of a step.

        They are summed over ranks first. Both overlap with what the caller does next.
        """
        gradients = self._on_host.get(exit_)
        if gradients is not None:
            with gradients.queue.after_this():
                self._reduce([self.wrappers[exit_]])
                self._norms[exit_] = self._squared_norm(exit_)
                gradients.finish()

    def reduce_gradients(self) -> None:
        """Wait for the gradient sums over data-parallel and sequence-parallel ranks, after the last backward of a
        step."""
        for exit_, gradients in self._on_host.items():
            if gradients.allocated:
                self.finish(exit_)
            gradients.queue.join()
        if not self._on_host:
            self._reduce(list(self.wrappers.values()))

    def _reduce(self, wrappers: list[DistributedDataParallel]) -> None:
        if self.groups.data.size() == self.groups.tensor.size() == 1:
            return  # a sum over one rank, for which gloo would copy every gradient
        with platform.translated():
            finalize_model_grads(wrappers, pg_collection=self.groups.collection)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Reduced gradient of a trained parameter before clipping, float32; in host memory, this rank's range of it."""
        for exit_, gradients in self._on_host.items():
            if parameter in set(exit_.parameters()):
                return gradients.of(parameter)
        return parameter.main_grad  # type: ignore[attr-defined, no-any-return]

    def squared_norm(self, exit_: nn.Module) -> Tensor:
        """This rank's share, a float64 scalar, of the squared norm of one exit's reduced gradients before clipping.

        The shares of all ranks add up: each data-parallel rank counts the elements that it updates. Parameters that all
        tensor-parallel ranks hold whole are counted by the first of these ranks.
        """
        return self._norms[exit_] if exit_ in self._norms else self._squared_norm(exit_)

    def _squared_norm(self, exit_: nn.Module) -> Tensor:
        first = self.groups.tensor.rank() == 0
        own = set(exit_.parameters())
        runs = [torch.zeros(1, device=platform.device())]
        for shard in self._updated_ranges():
            parameter, start, stop = shard.parameter, shard.start, shard.stop
            if parameter in own and stop > start and (first or getattr(parameter, "tensor_model_parallel", False)):
                runs += parameter.main_grad.view(-1)[start:stop].split(NORM_RUN)  # type: ignore[attr-defined]
        return torch.stack(torch._foreach_norm(runs)).double().square().sum()  # type: ignore[attr-defined]

    def step(self, grad_norm: float) -> None:
        """Clip, update, advance the schedule.

        Args:
            grad_norm: over all exits of all ranks, before clipping. megatron-core would compute it again and copy the
                gradients to scale them.
        """
        scale = self._clip / grad_norm if grad_norm > self._clip > 0 else 1.0
        for adam in self._adams():
            pull_to_initial(adam)
            if isinstance(adam, HostAdam):
                adam.scale = scale
        if scale != 1.0 and not self._on_host:
            for wrapper in self.wrappers.values():
                wrapper.scale_gradients(scale)
        with platform.translated():
            if not self._on_host:
                self.optimizer.prepare_grads()
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(1)

    def skip(self) -> None:
        """Advance the schedule without an update."""
        self.scheduler.step(1)

    def _updated_ranges(self) -> Iterator[Shard]:
        """The ranges of all trained parameters."""
        for part in self.optimizer.chained_optimizers:
            if part.optimizer is not None:
                yield from _shards(part)

    def parameter_states(self) -> Iterator[ParameterState]:
        """This rank's optimizer state, in place: writing into the tensors restores it.

        Before the first step Adam has no state. It is then created by a step without gradients, at a learning rate of
        0, which does not count.
        """
        for part in self.optimizer.chained_optimizers:
            if part.optimizer is None:
                continue
            if not part.optimizer.state:
                with platform.translated(), _without_rate(part.optimizer):
                    part._init_optimizer_states_with_dummy_values()
                set_adam_steps(part.optimizer, 0)
            for parameter in part.model_param_gbuf_map:
                bounds = part._get_model_param_range_map(parameter)["param"]
                state = part._get_main_param_and_optimizer_states(parameter)
                tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
                if parameter.dtype != torch.float32:
                    tensors["remainder" if state["param"].dtype == torch.int16 else "main"] = state["param"]
                group, place = part.model_param_group_index_map[parameter]
                if (initial := initial_values(part.optimizer.param_groups[group])[place]) is not None:
                    tensors["initial"] = initial
                yield ParameterState(parameter, bounds.start, bounds.end, tensors)

    def counters(self) -> dict[str, int]:
        """State that is not per parameter: the step counts of Adam and of the schedule."""
        return {"adam_step": max(map(adam_steps, self._adams()), default=0), "scheduler": self.scheduler.num_steps}

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Restore values of ``counters``, after the tensors."""
        for adam in self._adams():
            set_adam_steps(adam, counters["adam_step"])
        self.scheduler.step(counters["scheduler"] - self.scheduler.num_steps)


def _shards(part: Any) -> Iterator[Shard]:
    """The ranges of trained parameters that this data-parallel rank updates in one of megatron-core's optimizers."""
    for parameter in part.model_param_gbuf_map:
        bounds = part._get_model_param_range_map(parameter)["param"]
        group, place = part.model_param_group_index_map[parameter]
        yield Shard(parameter, bounds.start, bounds.end, part.optimizer.param_groups[group]["params"][place])


@contextlib.contextmanager
def _without_rate(adam: torch.optim.Optimizer) -> Iterator[None]:
    """While open, a step changes no weight, by weight decay neither."""
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate


def _scheduler(
    optimizer: Any, settings: OptimizerConfig, weight_decay: float, schedule: ScheduleConfig, steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the decay. Weight decay is constant.

    The first of ``n`` warm-up steps has rate ``lr / n``, since a step at rate 0 would change nothing.
    """
    warmup = min(round(schedule.warmup_fraction * steps), steps - 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=schedule.decay,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    scheduler.step(1)
    return scheduler

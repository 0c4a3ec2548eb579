"""The checks of a debug run: every module's output, every gradient and every frozen weight. Logs all shapes once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TextIO
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_ee.checkpoint.atomic import storage_errors
from megatron_ee.checkpoint.safetensors_file import tensor_bytes
from megatron_ee.data.loader import Batch
from megatron_ee.errors import UserError
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.gate import Gate
from megatron_ee.exits.stage import Stage
from megatron_ee.model.backbone import Backbone
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.tuning.trainer import Trainer

LOG = "debug.log"
METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    Stage: ("run_layers",),
    Backbone: ("embed",),
    DecoderLayer: ("attention_half", "mlp_half"),
    Exit: ("features", "statistics"),
}
"""Methods that also use modules, without the hooks that torch calls around ``forward``."""
NAN_GRADIENT = "returned nan values"
"""A part of the message of torch's anomaly detection."""


@contextlib.contextmanager
def checked(trainer: Trainer, passed: Callable[[str], None] = print) -> Iterator[None]:
    """Check the work of ``trainer`` while the context is open, and write ``debug.log`` to its output directory.

    Args:
        trainer: of a run of one process.
        passed: called with a line if all steps were done and all checks passed.

    Raises:
        UserError: a weight, a module's output or a gradient is not finite; or after all steps a trained parameter never
            had a gradient, or a frozen one changed. The message names the module or parameter.
        CheckpointError: the log cannot be written.
    """
    path = trainer.output / LOG
    with contextlib.ExitStack() as stack:
        with storage_errors(path, "write"):
            log = stack.enter_context(open(path, "w", buffering=1, encoding="utf-8"))
        checks = _Checks(trainer, log)
        checks.log_parameters()
        checks.attach(stack)
        frozen = checks.frozen_digests()
        yield
        checks.finish(frozen, passed)


class _Checks:
    """The checks of one trainer. Paths name modules and parameters of its stage."""

    def __init__(self, trainer: Trainer, log: TextIO) -> None:
        self._trainer, self._stage, self._log = trainer, trainer.pipeline.stage, log
        parameters = {_shown(name): parameter for name, parameter in self._stage.named_parameters()}
        if self._stage.backbone.slots is not None:  # they hold one layer after another
            parameters = {name: each for name, each in parameters.items() if not name.startswith("backbone.layers.")}
        self._parameters = parameters
        gates = (module for module in self._stage.modules() if isinstance(module, Gate))
        self._fitted = {id(parameter) for gate in gates for parameter in gate.parameters()}
        self._logged: set[str] = set()
        self._with_gradient: set[str] = set()
        self._microbatch = self._microbatches = 0
        self._validating = False
        self._exit = ""

    def log_parameters(self) -> None:
        """Log one line for each parameter, which must be finite."""
        for name, parameter in self._parameters.items():
            kind = "trained" if parameter.requires_grad else "fitted" if id(parameter) in self._fitted else "frozen"
            print(f"{name}: {_shape(parameter)}, {kind}", file=self._log)
        for name, parameter in self._parameters.items():
            if bad := _not_finite(parameter.detach()):
                raise UserError(f"{name}: {bad} as loaded; look at the model's files")

    def frozen_digests(self) -> dict[str, str]:
        """SHA-256 of each frozen parameter."""
        held = {name: p for name, p in self._parameters.items() if not p.requires_grad and id(p) not in self._fitted}
        frozen = {name: parameter.detach() for name, parameter in held.items()}
        return {name: hashlib.sha256(tensor_bytes(p.cpu().contiguous())).hexdigest() for name, p in frozen.items()}

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Hook every call, microbatch and update until ``stack`` closes."""

        def replace(target: object, name: str, around: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(target, name, partial(around, getattr(target, name))))

        for name, module in self._stage.named_modules():
            path = _shown(name)
            hook = partial(self._after_forward, path)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for method in METHODS.get(type(module), ()):
                replace(module, method, partial(self._around_method, path, module, method))
        embedding = self._stage.backbone.embedding
        assert embedding is not None, "one process starts from tokens"
        stack.callback(embedding.register_forward_pre_hook(self._next_microbatch).remove)
        replace(self._trainer.pipeline, "run", self._around_run)
        replace(self._trainer.optimizer, "step", self._before_update)
        replace(self._trainer.optimizer, "skip", self._before_update)
        if self._trainer.validate is not None:
            replace(self._trainer, "validate", self._around_validation)

    def finish(self, frozen: dict[str, str], passed: Callable[[str], None]) -> None:
        """The checks that need the whole run. ``frozen``: digests from the beginning."""
        for name, module in self._stage.named_modules():
            if _shown(name) not in self._logged:
                print(f"{_shown(name)}: {type(module).__name__}, not called", file=self._log)
        for name, digest in self.frozen_digests().items():
            if digest != frozen[name]:
                raise UserError(f"{name}: is frozen, but changed during the run")
        done, steps = self._trainer.progress, self._trainer.config.tuning.steps
        if done.step < steps:
            return  # stopped early: the remaining steps might have given a gradient
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        for name in trained:
            if name not in self._with_gradient:
                raise UserError(
                    f"{name}: is trained, but its gradient was zero up to step {steps}, over {done.tokens} tokens"
                )
        passed(
            f"debug: passed after step {steps}: the outputs of {len(self._logged)} modules and methods are finite, "
            f"{len(trained)} trained parameters have finite gradients that are not zero, {len(frozen)} frozen ones did "
            "not change"
        )

    def _where(self) -> str:
        step = self._trainer.progress.step
        at = f"validation after step {step}" if self._validating else f"step {step + 1}"
        return f"{at}, microbatch {self._microbatch} of {self._microbatches}"

    def _after_forward(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, Exit):
            self._exit = path
        self._called(path, module, (args, kwargs), output)

    def _around_method(
        self, path: str, module: nn.Module, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        output = method(*args, **kwargs)
        self._called(f"{path}.{name}", module, (args, kwargs), output)
        return output

    def _called(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Log a first call's shapes; its output must be finite."""
        kind = type(module).__name__
        if path not in self._logged:
            self._logged.add(path)
            print(f"{path}: {kind}({_shapes(inputs)}) -> {_shapes(output)}", file=self._log)
        for name, tensor in _tensors(output):
            if bad := _not_finite(tensor):
                which = f"its output {name}" if name else "its output"
                raise UserError(
                    f"{self._where()}: {path} ({kind}): {bad} in {which}; this is the first module with such an output"
                )

    def _next_microbatch(self, module: nn.Module, args: Any) -> None:
        self._microbatch += 1

    def _around_run(self, run: Callable[..., None], batches: Sequence[Batch], *work: Any, **options: Any) -> None:
        self._microbatch, self._microbatches = 0, len(batches)
        try:
            run(batches, *work, **options)
        except RuntimeError as error:
            if NAN_GRADIENT not in str(error):
                raise
            raise UserError(f"{self._where()}: {self._exit}: the backward pass: {error}") from error

    def _around_validation(self, validate: Callable[..., Any], *args: Any) -> Any:
        self._validating = True
        try:
            return validate(*args)
        finally:
            self._validating = False

    def _before_update(self, update: Callable[..., None], *arguments: float) -> None:
        """Check the gradients, which are complete and not yet clipped."""
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            gradient = self._trainer.optimizer.gradient(parameter)
            if bad := _not_finite(gradient):
                raise UserError(f"step {self._trainer.progress.step + 1}: the gradient of {name}: {bad}")
            if gradient.any():
                self._with_gradient.add(name)
        update(*arguments)


def _shown(name: str) -> str:
    """Path of a module or parameter of the stage, for the user."""
    return name.removeprefix("_") or "stage"


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers and dataclasses, each with its path in them."""
    if isinstance(value, Tensor):
        yield name.lstrip("."), value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{name}.{field.name}")


def _shapes(value: Any) -> str:
    return ", ".join(f"{name}={_shape(tensor)}" if name else _shape(tensor) for name, tensor in _tensors(value))


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _not_finite(tensor: Tensor) -> str:
    """Message with the number of NaN or infinite values and the index of the first; empty if all are finite."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return ""
    places = (~torch.isfinite(tensor)).nonzero()
    first = places[0].tolist()
    return (
        f"{len(places)} of {tensor.numel()} values are not finite, the first, {tensor[tuple(first)].item()}, at {first}"
    )

"""The ``model_args`` of the lm-evaluation-harness model: what is loaded, and how it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_ee.checkpoint.saved_model import SavedModel, quantise_layers
from megatron_ee.config.schema import Quantise, Residency, Weights
from megatron_ee.config.validation import Strict, one_of, validated
from megatron_ee.conversion.convert import Conversion, prepare
from megatron_ee.errors import ConfigError, shown
from megatron_ee.evaluation.tasks.answers import BATCH, Setting
from megatron_ee.inference.certificate import Calibration, open_calibration
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import POLICIES
from megatron_ee.inference.released import Released, open_released
from megatron_ee.inference.requests import Draft, Layers, Mode
from megatron_ee.inference.sampling import MAX_SEED

WHERE = "model_args"
POLICY = ("threshold", "thresholds", "measure", "max_deferred", "min_full", "backoff")
OF_MODE = {"threshold": ("policy", *POLICY, "calibration"), "speculative": ("draft_exit", "draft_length")}
"""By mode, the arguments that have an effect in this mode only."""


class HarnessArguments(Strict):
    """Arguments of the model, as of ``megatron-ee generate``, and those that the harness gives every model.

    Attributes:
        pretrained: Hugging Face directory or parallel checkpoint.
        adapter: directory of the exits; None for those in the model's directory.
        mode: see ``Request``; None for ``threshold`` if there are exits, else ``full``.
        exit: layer of an exit that answers alone, as the shallower model that it is. Every token, also of the prompt,
            runs only the layers of this model.
        exits: layers of the exits to use; None for all.
        policy: name of the exit policy, a key of ``POLICIES``.
        threshold: with the others of ``POLICY``: see ``policy``; None for the policy's default.
        calibration: certificate of ``megatron-ee calibrate``, whose thresholds are used. A request outside its settings
            runs in full mode.
        calibration_group: group of all requests, for a certificate with thresholds by group.
        uncertified: use the certificate's thresholds outside its settings, too.
        draft_exit: with ``draft_length``: see ``Draft``.
        seed: of sampling.
        max_length: largest number of tokens that the model reads; None for all its positions.
        max_gen_toks: largest number of tokens of an answer, unless the task or ``gen_kwargs`` say it.
        prefix_token_id: token before a text without context; None for beginning-of-text, else end-of-text.
        add_bos_token: whether texts begin with the beginning-of-text token; None for as the tokenizer does.
        enable_thinking: passed to the chat template.
        think_end_token: text that ends the thinking, which is cut off answers.
        dtype: with ``weights``, ``tensor``, ``pipeline`` and ``residency``: see ``EngineOptions``.
        quantise: see ``open_released``.
        kv_memory: gigabytes of KV cache; None for half of the free memory.
        verify: check checksums.
        batch_size: largest number of sequences that run together. ``auto`` or None: ``max_batch_size``, or 16.
        max_batch_size: see ``batch_size``.
        device: ignored; the model runs on the machine's accelerator if it has one.
    """

    pretrained: str = Field(min_length=1)
    adapter: str | None = None
    mode: Mode | None = None
    exit: int | None = Field(default=None, ge=1)
    exits: Annotated[Layers | None, BeforeValidator(lambda value: [value] if isinstance(value, int) else value)] = None
    policy: Annotated[str, one_of(POLICIES)] | None = None
    threshold: float | None = None
    thresholds: Mapping[Any, float] | None = None
    measure: str | None = None
    max_deferred: int | None = None
    min_full: int | None = None
    backoff: int | None = None
    calibration: str | None = Field(default=None, min_length=1)
    calibration_group: str | None = Field(default=None, min_length=1)
    uncertified: bool = False
    draft_exit: int | None = None
    draft_length: int | None = None
    seed: int = Field(default=0, ge=0, le=MAX_SEED // 2)
    max_length: int | None = Field(default=None, ge=2)
    max_gen_toks: int = Field(default=256, ge=1)
    prefix_token_id: int | None = Field(default=None, ge=0)
    add_bos_token: bool | None = None
    enable_thinking: bool | None = None
    think_end_token: str | None = Field(default=None, min_length=1)
    dtype: str = "auto"
    weights: Weights = "packed"
    quantise: Quantise = "none"
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    residency: Residency = "device"
    kv_memory: float | None = Field(default=None, gt=0, le=1e9)
    verify: bool = True
    batch_size: int | str | None = None
    max_batch_size: int | None = Field(default=None, ge=1)
    device: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.exit is not None:
            others = ("exits", *(name for names in OF_MODE.values() for name in names))
            for name in ("mode", *others):
                if getattr(self, name) is not None and (name, self.mode) != ("mode", "full"):
                    raise ValueError(f"{name}: has no effect with exit, which answers alone; leave out one of the two")
        if self.mode is not None:
            self._check_effects(self.mode)
        self._check_calibration()
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking: give think_end_token too, so that the thinking is cut off answers")
        _ = self.num_seqs
        return self

    def _check_effects(self, used: Mode) -> None:
        if used == "full" and self.exits is not None:
            raise ValueError("exits: has no effect in mode full, which asks none; leave it out, or use another mode")
        for mode, names in OF_MODE.items():
            for name in names:
                if used != mode and getattr(self, name) is not None:
                    raise ValueError(f"{name}: has no effect in mode {used}; leave it out, or use mode={mode}")

    def _check_calibration(self) -> None:
        if self.calibration is None:
            for name in ("calibration_group", "uncertified"):
                if getattr(self, name):
                    raise ValueError(f"{name}: has an effect with calibration only; give it too, or leave this out")
            return
        for name in ("policy", "exits", *POLICY):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: has no effect with calibration, which sets the thresholds; leave it out")

    @property
    def num_seqs(self) -> int:
        """Largest number of sequences that run together."""
        size = self.batch_size
        if isinstance(size, str) and size.isdecimal():
            size = int(size)
        if isinstance(size, int):
            if size < 1:
                raise ValueError(f"batch_size: must be at least 1, not {size}")
            return size
        if size is not None and size.partition(":")[0] != "auto":
            raise ValueError(f"batch_size: must be a whole number or auto, not {shown(size)}")
        return self.max_batch_size or BATCH

    def check_paths(self) -> None:
        """Check that the directories and the certificate exist.

        Raises:
            ConfigError: one does not.
        """
        for name in ("pretrained", "adapter"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_dir():
                raise ConfigError(f"{WHERE}: {name}: no such directory: {path}; give one on this machine")
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise ConfigError(f"{WHERE}: calibration: no such file: {self.calibration}; give one on this machine")

    def open(self) -> Released:
        """Open the model and its exits, or the model that ``exit`` is.

        Raises:
            ConfigError: a directory does not exist, or the model cannot be quantised.
            CheckpointError: the model or the adapter is invalid, or there is no such exit.
            DataError: the tokenizer is invalid.
        """
        self.check_paths()
        quantise: Quantise = "none" if self.exit is not None else self.quantise
        released = open_released(self.pretrained, self.adapter, verify=self.verify, quantise=quantise)
        if self.exit is None:
            return released
        if released.adapter is None:
            raise ConfigError(f"{WHERE}: exit: there are no exits; give their adapter")
        alone = exit_as_model(released, self.exit, verify=self.verify)
        return dataclasses.replace(alone, model=quantise_layers(alone.model, self.quantise, f"{WHERE}: quantise"))

    def setting(self, released: Released) -> Setting:
        """How the model answers; ``released`` is from ``open``.

        Raises:
            ConfigError: an argument does not fit the exits; the message names it.
        """
        mode: Mode = self.mode or ("threshold" if released.exits else "full")
        try:
            self._check_effects(mode)
        except ValueError as error:
            raise ConfigError(f"{WHERE}: {error}") from None
        given = {name: getattr(self, name) for name in POLICY}
        policy = validated(
            POLICIES[self.policy or "threshold"],
            {name: value for name, value in given.items() if value is not None},
            where=WHERE,
        )
        setting = Setting(mode, mode, policy, self.exits, max_tokens=self.max_gen_toks)
        gates = [spec.layer for spec in released.exits if spec.gate]
        layers, depth = [spec.layer for spec in released.exits], released.model.architecture.num_layers
        try:
            setting.request((0,), draft=self.draft).check(layers, depth, gates=gates)
        except ConfigError as error:
            raise ConfigError(f"{WHERE}: {str(error).replace('draft.exit', 'draft_exit', 1)}") from None
        return setting

    def certificate(self, released: Released) -> Calibration | None:
        """The certificate, checked against the model; None without one.

        Raises:
            DataError: it cannot be read, or was made for something else.
            ConfigError: ``calibration_group`` is given, and it has no thresholds by group.
        """
        if self.calibration is None:
            return None
        options = EngineOptions(dtype=self.dtype, weights=self.weights)
        calibration = open_calibration(Path(self.calibration), released, options, quantise=self.quantise)
        calibration.check_group(self.calibration_group)
        return calibration

    @property
    def draft(self) -> Draft:
        """Draft settings of speculative mode."""
        return validated(Draft, {"exit": self.draft_exit, "length": self.draft_length}, where=f"{WHERE}: draft")

    def options(self, released: Released, setting: Setting, calibration: Calibration | None = None) -> EngineOptions:
        """Options of the engine, which loads the exits that the setting or the certificate uses.

        Raises:
            ConfigError: an option does not fit the model or the number of processes.
        """
        request = setting.request((0,))
        if calibration is not None:
            request = calibration.apply(request, chat=False, group=self.calibration_group, uncertified=True)
        options = EngineOptions(
            dtype=self.dtype,
            weights=self.weights,
            tensor=self.tensor,
            pipeline=self.pipeline,
            residency=self.residency,
            exits=() if request.mode == "full" else request.exits,
            kv_memory=None if self.kv_memory is None else int(self.kv_memory * 1e9),
            max_num_seqs=self.num_seqs,
            prefix_cache_seqs=2 * self.num_seqs,  # choices of one context, and examples before each question
        )
        options.check(released)
        return options


def exit_as_model(released: Released, layer: int, *, verify: bool = True) -> Released:
    """The exit after ``layer`` as the plain model that ``convert --exit`` writes. Nothing is written or loaded.

    Args:
        released: the model with its exits.
        layer: of the exit.
        verify: check checksums.

    Raises:
        CheckpointError: there is no such exit, or no plain model is equivalent to its body.
    """
    assert released.adapter is not None, "there are no exits"
    asked = Conversion(released.adapter.path, "hf", model=released.path, exit=layer, verify=verify)
    _, contents = prepare(asked)
    assert contents.architecture is not None, "a plain model has one"
    model = SavedModel(released.path, contents.architecture, dict(contents.backbone))
    return dataclasses.replace(released, model=model, adapter=None)

"""The options of an engine, and the checks of them that need no loaded model."""

from __future__ import annotations

from pydantic import Field

from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_pipeline, check_tensor
from megatron_ee.config.schema import Residency, Weights
from megatron_ee.config.validation import Strict
from megatron_ee.errors import ConfigError
from megatron_ee.inference.compiled import check_compiler
from megatron_ee.inference.released import Released
from megatron_ee.inference.requests import Ids, Layers, check_ids
from megatron_ee.parallel.groups import world_size


class EngineOptions(Strict):
    """How a model is loaded, and how its engine runs.

    Attributes:
        dtype: dtype of the model and the KV cache; ``auto`` for the checkpoint's.
        weights: how a quantised model's weights are held, see ``ModelConfig``.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        residency: where the layers' weights are, see ``ModelConfig``. Streamed layers are read for every pass, so a
            token takes at least the time to read the layers that it runs.
        exits: layers of the exits to load; None for all. Other exits cost no memory or time, and requests that name
            them are errors. A ``layer`` exit has its own KV, which every token fills, so full mode is faster without
            it.
        candidates: token ids that a drafting exit may propose, for example from ``data.indexed.frequent_tokens``. It
            then computes only their logits (FR-Spec, arXiv 2502.14856). The full model still emits any token. None for
            all.
        compile: compile the layers between exits, which makes a sequence that runs alone faster.
        kv_memory: bytes of KV cache on each rank; None for half of the memory that is free after loading.
        max_num_seqs: maximum number of running sequences; others wait.
        prefix_cache_seqs: maximum number of finished sequences whose KV is kept while memory permits. A request that
            starts with the same tokens, such as the next message of a chat, copies this KV. Its rounding is then that
            of the other request, which may differ from its own because passes of different sizes round differently.
    """

    dtype: str = "auto"
    weights: Weights = "packed"
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    residency: Residency = "device"
    exits: Layers | None = None
    candidates: Ids | None = None
    compile: bool = False
    kv_memory: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=16, ge=1)
    prefix_cache_seqs: int = Field(default=0, ge=0)

    def check(self, released: Released) -> None:
        """Check the options against the model and the number of processes, before anything is loaded.

        Raises:
            ConfigError: an option is invalid; the message names it.
        """
        arch = released.model.architecture
        check_parallel(arch, self.tensor, self.pipeline, world_size())
        if self.compile:
            check_compiler(arch, self.tensor, self.residency)
            if packed_slots(released.model, self.weights):
                raise ConfigError(
                    "weights: compile needs those of all layers in memory; use expanded, or do not compile"
                )
        known = [spec.layer for spec in released.exits]
        for layer in self.exits or ():
            if layer not in known:
                raise ConfigError(f"exits: there is no exit after layer {layer}; there are: {known or 'none'}")
        if self.candidates is not None:
            check_ids("candidates", self.candidates, arch.vocab_size)
            if not self.candidates:
                raise ConfigError("candidates: there are none; give some token ids, or None for all")


def check_parallel(architecture: Architecture, tensor: int, pipeline: int, processes: int) -> None:
    """Check the parallel sizes.

    Raises:
        ConfigError: they do not fit the model or the number of processes; the message names the option.
    """
    if processes != tensor * pipeline:
        raise ConfigError(
            f"tensor x pipeline: {tensor} x {pipeline} needs {tensor * pipeline} processes, but there are {processes}; "
            "start as many with torchrun, or change the options"
        )
    check_pipeline(architecture.num_layers, pipeline, "pipeline")
    check_tensor(architecture, tensor, "tensor")

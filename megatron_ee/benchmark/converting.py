"""One process of a conversion: it makes the random model, converts, or says what is in a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.benchmark.machine import SEED, Machine
from megatron_ee.benchmark.shape import Shape
from megatron_ee.checkpoint.conversion.contents import Contents
from megatron_ee.checkpoint.conversion.convert import Request, Target, plan_output, prepare
from megatron_ee.checkpoint.conversion.copy import write_output
from megatron_ee.checkpoint.conversion.to_hf import to_hf
from megatron_ee.checkpoint.digest import file_sha256, hash_workers
from megatron_ee.checkpoint.hf_directory import HFDirectory
from megatron_ee.checkpoint.names import expected_tensors
from megatron_ee.checkpoint.tensors import StoredTensor, stored
from megatron_ee.config.architecture import parse_architecture

PERIOD = 2_097_143
"""Random values that all weights repeat: a prime number, so that no two rows or tensors begin alike."""


@contextlib.contextmanager
def converting() -> Iterator[Converting]:
    """For a worker: the object below, on the host also where there is an accelerator."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    yield Converting()


class Converting:
    """Its methods keep nothing, so that a process's peak memory is that of what it did."""

    def describe(self) -> dict[str, Any]:
        """Device, threads and library, as they stand beside the figures."""
        return Machine().describe()

    def make_model(self, directory: str, shape: Shape) -> dict[str, Any]:
        """Stream a bfloat16 model with a head of its own to a new Hugging Face directory.

        Returns:
            The shape, and ``bytes``, ``tensors``, ``largest_tensor`` (bytes), ``files``.
        """
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        values = torch.randn(PERIOD, generator=torch.Generator().manual_seed(SEED)).to(torch.bfloat16)
        architecture = parse_architecture(config)
        tensors = {
            name: StoredTensor(torch.bfloat16, sizes, _repeated(values, sizes, number), ())
            for number, (name, sizes) in enumerate(expected_tensors(architecture).items())
        }
        assets: dict[str, Path | bytes] = {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
        output = to_hf(Contents(Path(directory), "random model", architecture, tensors, assets=assets))
        write_output(output, Path(directory))
        return {
            **dataclasses.asdict(shape),
            "dtype": "bfloat16",
            "bytes": output.nbytes,
            "tensors": len(tensors),
            "largest_tensor": max(tensor.nbytes for tensor in tensors.values()),
            "files": len(output.files),
        }

    def convert(self, source: str, target: str, to: Target, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
        """What ``megatron-ee convert`` does with ``--to``, ``--tensor`` and ``--pipeline``.

        Returns:
            ``seconds``; ``libraries``, bytes that the process held before; ``memory``, most that it held beyond them.
        """
        before, start = platform.peak_memory(), time.perf_counter()
        request = Request(Path(source), to, tensor=tensor, pipeline=pipeline)
        _, contents = prepare(request)
        write_output(plan_output(contents, request), Path(target))
        elapsed = time.perf_counter() - start
        return {"seconds": elapsed, "libraries": before, "memory": platform.peak_memory() - before}

    def digests(self, directory: str) -> dict[str, str]:
        """Of a Hugging Face directory: dtype, shape and SHA-256 of each tensor's bytes, SHA-256 of ``config.json``."""
        entries = HFDirectory.open(directory).tensors
        with ThreadPoolExecutor(hash_workers()) as pool:
            hashes = pool.map(lambda entry: stored(entry).sha256(), entries.values())
            found = {
                name: f"{entry.dtype} {list(entry.shape)} {sha256}"
                for (name, entry), sha256 in zip(entries.items(), hashes, strict=True)
            }
        return {**found, "config.json": file_sha256(Path(directory) / "config.json")}


def _repeated(values: Tensor, shape: Sequence[int], number: int) -> Callable[[Tensor, Sequence[int]], None]:
    """Reads whole rows of a tensor whose elements, row-major, are ``values`` over and over; ``number`` shifts them."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        place = (number * 7919 + offset[0] * math.prod(shape[1:])) % PERIOD
        flat, done = out.view(-1), 0
        while done < len(flat):
            run = values[place : place + len(flat) - done]
            flat[done : done + len(run)] = run
            done, place = done + len(run), 0

    return read

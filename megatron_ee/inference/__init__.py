"""Generation with early exits: requests, the engine that batches them, the KV cache, exit policies and drafts."""

from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ExitPolicy, GatePolicy, ThresholdPolicy
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Completion, Draft, Event, Request, Token
from megatron_ee.inference.sampling import Sampling

__all__ = [
    "Completion",
    "Draft",
    "Engine",
    "EngineOptions",
    "Event",
    "ExitPolicy",
    "GatePolicy",
    "Request",
    "Sampling",
    "ThresholdPolicy",
    "Token",
    "open_engine",
    "open_released",
]

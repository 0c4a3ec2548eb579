"""Generation with early exits: requests, the engine that batches them, the KV cache, exit policies and drafts.

A token *asks* an exit: its pass stops at the exit's layer, the exit's head (or gate) runs, and the request's policy
decides whether the token *leaves* there. A token that leaves is *deferred*: its layers above the exit run later,
together with the next token of its sequence that goes deeper. So a pass runs a range of layers, not the whole model,
and the scheduler tracks for each sequence how deep its newest token is.

For a reader of vLLM:

- ``engine`` and ``output_processor``: requests, text and events, as in ``LLMEngine``.
- ``scheduler`` and ``sequence``: which sequences run, preemption and the next pass. ``Sequence`` is vLLM's ``Request``.
- ``passes``: what the scheduler tells a pipeline stage, as ``SchedulerOutput`` does.
- ``stage_runner``, ``kv_cache`` and ``compiled``: the tensors of one stage, as in the model runner. The cache of a
  sequence is contiguous in each layer; there are no blocks.
- ``kv_cache_manager``: opening and closing the caches of sequences: the budget of KV memory, and prefix reuse.
- ``heads`` and ``sampling``: from logits to tokens, as in the sampler and the rejection sampler.
- ``policy`` and ``speculation``: where tokens leave, and what is drafted.
- ``replay``: what every exit says of a given text, in one pass. vLLM's ``prompt_logprobs``, for all exits.
- ``released``, ``options``, ``loading`` and ``remote``: opening a model, and building an engine over several ranks.
- ``certificate``: thresholds with a tested bound on their loss, and the requests that they are for.
- ``offline``: many requests at once.
"""

from megatron_ee.inference.certificate import open_calibration
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
    "open_calibration",
    "open_engine",
    "open_released",
]

"""Early-exit tuning of released large language models, on top of megatron-core."""

__version__ = "0.1.0"

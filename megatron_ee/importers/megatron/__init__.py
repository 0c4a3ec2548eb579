"""Checkpoints of Megatron-LM, Megatron-Bridge and EE-LLM. They contain pickles, which only these modules read."""

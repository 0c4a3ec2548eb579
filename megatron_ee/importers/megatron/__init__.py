"""Checkpoints of Megatron-LM, Megatron-Bridge and EE-LLM. They hold pickles: the only modules that touch any."""

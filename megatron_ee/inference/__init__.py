"""Decoding with early exits: exit policy, KV cache, the pass that defers layers, and text from a prompt."""

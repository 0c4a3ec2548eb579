"""GGUF files, which llama.cpp and its relatives use. Their tensors are dequantised by the package ``gguf``."""

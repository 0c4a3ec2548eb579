"""Text to batches: tokenizers, indexed corpora, chat data and the loader."""

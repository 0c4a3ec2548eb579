"""Reading and writing checkpoints: released models, native checkpoints, exit adapters."""

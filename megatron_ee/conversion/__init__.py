"""Any checkpoint format into any other, streamed: ``checkpoint.contents`` is what they have in common."""

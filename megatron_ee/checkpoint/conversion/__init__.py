"""Any checkpoint format into any other, streamed: ``contents`` is what they have in common."""

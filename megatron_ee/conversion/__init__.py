"""Converts any checkpoint format into any other, streamed. ``checkpoint.contents`` is the common form."""

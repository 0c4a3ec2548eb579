"""The bodies of the HTTP API, and how they become requests of the engine.

- ``request_bodies`` and ``response_bodies``: their fields; ``read_body``: from bytes to a request body.
- ``translate``: from a body to requests of the engine, with ``prompts`` and ``early_exit`` for its two larger parts.
- ``logprobs``: log-probabilities in responses; ``errors``: errors in OpenAI's shape.
"""

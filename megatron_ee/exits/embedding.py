"""Body ``embedding``: the head reads h_k directly."""

from __future__ import annotations

from megatron_ee.exits.body import Body


class EmbeddingBody(Body):
    """``h_k``."""

    not_plain = "these families always have an RMSNorm before the head"


BODY = EmbeddingBody

"""Exits: one file per body, the heads, and the stage that hosts exits beside its layers.

To add a body ``name``:

1. Write ``exits/name.py`` with a subclass of ``body.Body``, and assign the class to ``BODY``. ``attention_half`` is
   the part that needs all tokens or a cache, ``rest`` works token by token.
2. Let it declare what differs from the defaults: ``taps`` (h or r of layer k), ``parts`` (its trained tensors: names in
   an adapter, shapes, cut by tensor parallelism, what they are copied from, their names in a plain model) and ``saved``
   (the first words of these names), ``frozen`` (norms of the backbone that it reads through), ``windows`` (of attention
   of its own, which needs a cache in inference and whole sequences in tuning), ``flops`` and ``graph_bytes`` (for the
   plan), ``fit`` and ``fitted_rows`` (for a closed-form fit before tuning), ``extra_layers`` and ``not_plain`` (for the
   export as a shallower model).
3. Add ``name`` to ``Body`` in ``config/schema.py``, which is the registry, and to its description in ``ExitConfig``.

A part that is not copied is drawn by ``checkpoint.initialise.random_tensor``. Tuning, plan, checkpoints, adapters and
inference use these declarations. No code outside this package branches on the name of a body.
"""

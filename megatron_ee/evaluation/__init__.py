"""What early exit gains and costs, measured and tested.

- Each exit on a corpus: ``evaluate``, with ``quality``, ``speed``, ``report`` and ``plots``.
- The same while exits are tuned: ``validation``, with ``final_exit``, ``continuations``, ``decoding``, ``acceptance``,
  ``free_running``, and the run's ``history`` and ``timeline``.
- Before anything is tuned: ``probe``.
- Whole answers beside full mode's: ``tasks``, by ``groups``; published benchmarks: ``harness``.
- A tested bound of what early exit costs: ``calibration``; whether it is still kept: ``drift``.
- One answer for a reader: ``explain``, drawn with ``tinted``; all results on one page: ``page``.

Several of these share ``statistics``, their intervals and tests, and ``figure``, the style of their plots.
"""

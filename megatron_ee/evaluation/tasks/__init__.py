"""Tasks: records with references or choices, answered in every mode, scored and compared with full mode.

``records`` reads the files, ``answers`` and ``choices`` run the engine, ``metrics`` and ``agreement`` score what came
out, and ``results`` puts the figures together, which ``report`` shows.
"""

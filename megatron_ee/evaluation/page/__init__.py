"""The page of ``megatron-ee report``: what was gained and risked, for readers who do not read code.

``sources`` reads what other commands left on disk, and refuses files of different models. The modules named
``*_section`` turn it into blocks of text, tables and figures in one language. ``render`` makes one self-contained HTML
file of them.
"""

LANGUAGES = ("en", "ja")
"""Languages of the page."""

"""What all plots share: colours, style, and saving. matplotlib is imported on demand and needs no display."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.checkpoint.ownership import MADE_BY, check_file
from megatron_ee.errors import ConfigError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour-blind safe palette (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
FORMATS = (".png", ".pdf", ".svg")
STYLE: dict[str, Any] = {
    "text.parse_math": False,  # names from files may hold dollar signs
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}
MISSING = "Glyph .* missing from"
"""Beginning of matplotlib's warning of a letter that its font lacks."""


def check_plot(path: Path, option: str) -> None:
    """Check where a plot is to be written, before there is anything to plot.

    Raises:
        ConfigError: the format is unknown, or the file exists and is not this package's; the message names the option.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option}: {path} must end in one of {', '.join(FORMATS)}")
    check_file(path, option)


@contextmanager
def saved_figure(path: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure, and save it to ``path`` atomically if the block ends without an error."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"{target}: a plot must be one of {', '.join(FORMATS)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with mpl.rc_context(STYLE), _missing_letters_told(target):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # without pyplot, which keeps state and may look for a display
        yield figure
        try:
            figure.savefig(temporary, format=target.suffix[1:].lower(), metadata={"Creator": MADE_BY})
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _missing_letters_told(path: Path) -> Iterator[None]:
    """Say once that the font of a plot lacks letters; matplotlib warns of each of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=MISSING)
        yield
    others = [each for each in caught if not re.match(MISSING, str(each.message))]
    for each in others:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if len(others) < len(caught):
        print(f"{path}: the plot's font lacks some letters, which it shows as boxes", file=sys.stderr)

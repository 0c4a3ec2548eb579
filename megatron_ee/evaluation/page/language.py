"""Texts and numbers of the page in one language. All texts of a language are in ``texts/LANGUAGE.yaml``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

MINUS = "\N{MINUS SIGN}"
MINUTE, HOUR, DAY = 60, 3600, 86400


@dataclass(frozen=True)
class Language:
    """A language.

    Attributes:
        code: of ``page.LANGUAGES``, for the attribute ``lang``.
        texts: by key. ``{name}`` stands for a value.
    """

    code: str
    texts: Mapping[str, str]

    def __call__(self, key: str, **values: Any) -> str:
        """The text of a key with its values.

        Raises:
            KeyError: there is no such text, or a value is missing.
        """
        return self.texts[key].format(**values)

    def heading(self, key: str, **values: Any) -> str:
        """The text of a key as a heading, which begins with a capital letter."""
        text = self(key, **values)
        return text[:1].upper() + text[1:]

    def joined(self, items: Iterable[str], most: int | None = None) -> str:
        """Items of a list in a sentence. Of more than ``most`` it gives the first ones and the number of the others."""
        found = list(items)
        names = self.texts["list.separator"].join(found[:most])
        return names if most is None or len(found) <= most else self("list.more", names=names, count=len(found) - most)

    def number(self, value: float, digits: int = 0) -> str:
        """With thousands separators. A value that is not finite, or a whole number too large for a float, is ``-``."""
        try:
            return f"{value:,.{digits}f}".replace("-", MINUS) if math.isfinite(value) else "-"
        except OverflowError:
            return "-"

    def percent(self, share: float) -> str:
        """A share in percent, with a decimal."""
        return f"{self.number(100 * share, 1)}%" if math.isfinite(share) else "-"

    def limit(self, share: float) -> str:
        """A share that somebody chose, in percent without needless decimals."""
        return f"{100 * share:.4g}%"

    def points(self, difference: float) -> str:
        """A difference of shares in percentage points, with its sign and without the unit."""
        text = f"{100 * difference:+.1f}".replace("-", MINUS)
        return "0.0" if text.strip(f"+{MINUS}") == "0.0" else text

    def times(self, factor: float) -> str:
        """A factor, such as a speed."""
        return self("unit.times", value=self.number(factor, 2))

    def duration(self, seconds: float) -> str:
        """Time in the two units that suit; ``-`` if it is not finite."""
        if not math.isfinite(seconds):
            return "-"
        if seconds < 2 * MINUTE:
            return self("unit.seconds", value=self.number(seconds, 0 if seconds >= 10 else 1))
        for unit, size, smaller, part in (
            ("days", DAY, "hours", HOUR),
            ("hours", HOUR, "minutes", MINUTE),
            ("minutes", MINUTE, "seconds", 1),
        ):
            if seconds >= size:
                parts = round(seconds / part)
                whole, rest = divmod(parts, size // part)
                first = self(f"unit.{unit}", value=self.number(whole))
                second = self(f"unit.{smaller}", value=rest)
                return self.texts["unit.separator"].join([first, second]) if rest else first
        raise AssertionError("one minute is at most this long")

    def size(self, nbytes: int) -> str:
        """Bytes in the unit that suits, of 1000."""
        value, unit = float(nbytes), "B"
        for unit in ("B", "kB", "MB", "GB", "TB"):
            if value < 1000 or unit == "TB":
                break
            value /= 1000
        return f"{self.number(value, 0 if unit == 'B' else 1)} {unit}"

    def date(self, iso: str) -> str:
        """The date of an ISO 8601 time, as it is written in this language; other text is returned as it is."""
        year, *rest = iso[:10].split("-")
        if len(rest) != 2 or not all(part.isascii() and part.isdecimal() for part in (year, *rest)):
            return iso[:40]
        month, day = (int(part) for part in rest)
        name = self.texts.get(f"month.{month}", str(month))
        return self("date", year=int(year), month=name, day=day)


def load_language(code: str) -> Language:
    """The texts of a language of ``page.LANGUAGES``."""
    content = (files(__package__) / "texts" / f"{code}.yaml").read_text(encoding="utf-8")
    return Language(code, yaml.safe_load(content))

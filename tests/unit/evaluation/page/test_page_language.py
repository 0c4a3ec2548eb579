"""Texts of the page: both languages say the same things, and each text that is asked for is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ee.evaluation.page import LANGUAGES
from megatron_ee.evaluation.page.language import load_language

PACKAGE = Path(__file__).resolve().parents[4] / "megatron_ee" / "evaluation" / "page"
KEY = re.compile(r"""\bt(?:\.heading)?\(\s*f?["']([\w.{}\[\]-]+)["']""")
FIELDS = re.compile(r"\{(\w+)\}")


def test_the_languages_have_the_same_keys_and_values() -> None:
    first, *others = (load_language(code).texts for code in LANGUAGES)
    assert len(first) > 200
    for other in others:
        assert other.keys() == first.keys()
        for key, text in first.items():
            assert set(FIELDS.findall(other[key])) == set(FIELDS.findall(text)), key
            assert other[key].strip() or not text.strip(), key


def test_every_text_that_is_asked_for_is_there() -> None:
    texts = load_language("en").texts
    sources = [*PACKAGE.glob("*.py"), *PACKAGE.glob("templates/*.jinja")]
    asked = {key for path in sources for key in KEY.findall(path.read_text(encoding="utf-8"))}
    assert len(asked) > 100
    for key in asked:
        beginning = key.partition("{")[0]
        made = "{" in key or key.endswith(".")  # the rest of the key is a value
        assert key in texts or (made and any(name.startswith(beginning) for name in texts)), key


def test_japanese_has_japanese_texts() -> None:
    english, japanese = load_language("en").texts, load_language("ja").texts
    same = {key for key in english if english[key] == japanese[key]}
    assert same <= {"score.f1", "score.rouge_l", "unit.separator"}, same
    sentences = [key for key, text in japanese.items() if text.endswith("。")]
    # sentences end politely, headings and captions may not
    polite = [
        key
        for key in sentences
        if re.search(r"(です|ます|ません|でした|ました|ください|ません)（?.*。$", japanese[key])
    ]
    assert len(polite) > 0.9 * len(sentences), sorted(set(sentences) - set(polite))


def test_japanese_has_one_word_for_one_thing() -> None:
    report = "\n".join(load_language("ja").texts.values())
    chat = (PACKAGE.parents[1] / "serving" / "page" / "texts.js").read_text(encoding="utf-8")
    for text in (report, chat):
        for word in ("出口", "しきい値", "フルモード", "保証書", "リクエスト", "提案", "終了層の平均"):
            assert word in text, word
        for other in ("閾値", "証明書", "要求", "下書き", "平均の層", "平均の終了層"):
            assert other not in text, other


def test_texts_and_templates_are_package_data() -> None:
    setup = (PACKAGE.parents[2] / "setup.py").read_text(encoding="utf-8")
    patterns = re.search(r'"megatron_ee\.evaluation\.page": \[(.*?)\]', setup)
    assert patterns is not None
    packed = {path for pattern in re.findall(r'"(.*?)"', patterns[1]) for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == others and len(packed) == 2 + len(LANGUAGES)


@pytest.mark.parametrize(
    ("seconds", "english", "japanese"),
    [
        (0.25, "0.2 s", "0.2 秒"),
        (119.4, "119 s", "119 秒"),
        (125, "2 min 5 s", "2 分 5 秒"),
        (3600, "1 h", "1 時間"),
        (7199, "2 h", "2 時間"),
        (90_000, "1 d 1 h", "1 日 1 時間"),
    ],
)
def test_durations(seconds: float, english: str, japanese: str) -> None:
    assert load_language("en").duration(seconds) == english
    assert load_language("ja").duration(seconds) == japanese


def test_numbers_and_dates() -> None:
    t = load_language("en")
    assert t.number(1234567) == "1,234,567" and t.number(-1.25, 1) == "−1.2" and t.number(float("nan")) == "-"
    assert t.points(-0.0004) == "0.0" and t.points(0.0123) == "+1.2" and t.points(-0.05) == "−5.0"
    assert t.percent(0.0512) == "5.1%" and t.size(999) == "999 B" and t.size(15_929_920) == "15.9 MB"
    assert t.date("2026-11-30T20:33:21+00:00") == "30 November 2026" and t.date("<b>") == "<b>"
    assert t.date("202²-01-01") == "202²-01-01" and t.date("2026-01") == "2026-01"
    assert t.number(10**400) == "-" and t.duration(float("inf")) == "-"
    assert load_language("ja").date("2026-11-30") == "2026年11月30日"

"""Groups of prompts by script and length."""

from __future__ import annotations

import pytest

from megatron_ee.evaluation.groups.prompts import length_bucket, script


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is the capital of Peru?", "Latin"),
        ("Où est la gare ? Straße, żółć", "Latin"),
        ("日本の首都はどこですか。", "Japanese"),
        ("ラーメン", "Japanese"),
        ("ﾗｰﾒﾝ", "Japanese"),
        ("日本的首都是哪里？", "Han"),
        ("서울은 어디에 있습니까?", "Hangul"),
        ("Где находится Москва?", "Cyrillic"),
        ("أين تقع القاهرة؟", "Arabic"),
        ("מהי בירת ישראל?", "Hebrew"),
        ("Πού είναι η Αθήνα;", "Greek"),
        ("दिल्ली कहाँ है?", "Devanagari"),
        ("กรุงเทพอยู่ที่ไหน", "Thai"),
        ("ᏣᎳᎩ", "other script"),
        ("Translate to English: こんにちは", "Latin"),
        ("2 + 2 = ?", "no letters"),
        ("", "no letters"),
    ],
)
def test_script(text: str, name: str) -> None:
    assert script(text) == name


def test_lengths() -> None:
    lengths = (0, 1, 32, 33, 64, 65, 128, 129, 5000)
    buckets = ["1-32", "1-32", "1-32", "33-64", "33-64", "65-128", "65-128", "129-256", "4097-8192"]
    assert [length_bucket(each) for each in lengths] == buckets

"""The prompts of the quickstart: well-formed, varied, and no two alike."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_ee.data.chat import check_messages

PROMPTS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "prompts.jsonl"


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def text(prompt: dict[str, Any]) -> str:
    """All that a prompt says."""
    return prompt["prompt"] if "prompt" in prompt else " ".join(turn["content"] for turn in prompt["messages"])


def words(prompt: dict[str, Any]) -> list[str]:
    return re.findall(r"[\w']+", text(prompt).casefold())


def test_every_line_is_a_prompt() -> None:
    prompts = read()
    assert 380 <= len(prompts) <= 450
    assert [prompt.pop("id") for prompt in prompts] == list(range(1, len(prompts) + 1))
    for prompt in prompts:
        assert set(prompt) in ({"prompt"}, {"messages"})
        if "messages" in prompt:
            check_messages(prompt["messages"], text(prompt))
            roles = [turn["role"] for turn in prompt["messages"]]
            roles = roles[1:] if roles[0] == "system" else roles
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert text(prompt) == text(prompt).strip() != ""


def test_no_two_prompts_are_alike() -> None:
    prompts = read()
    for one, other in itertools.combinations([set(words(prompt)) for prompt in prompts], 2):
        assert len(one & other) < 0.8 * len(one | other), (one, other)
    beginnings = Counter(tuple(words(prompt)[:4]) for prompt in prompts)
    assert beginnings.most_common(1)[0][1] <= 8, beginnings.most_common(3)


def test_lengths_differ() -> None:
    lengths = sorted(len(words(prompt)) for prompt in read())
    assert lengths[0] <= 3 and 6 <= lengths[len(lengths) // 2] <= 16 and lengths[-10] >= 25

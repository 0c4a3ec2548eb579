"""Answers explained: who emitted each token, who was asked, and what the others and full mode say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import UserError
from megatron_ee.evaluation.explain import Explanation, explain
from megatron_ee.evaluation.explain_page import explanation_page
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Coverage, Draft, Request
from megatron_ee.inference.sampling import Sampling

PROMPT = "Once upon"
DRAWN = Sampling(temperature=1.0, seed=4)
EARLY = ThresholdPolicy(threshold=0.02, thresholds={2: 0.03}, max_deferred=3, min_full=2, backoff=1)


@pytest.fixture(scope="module")
def opened(byte_model: Path, adapter: Path) -> Iterator[tuple[Engine, Tokenizer]]:
    """With exits after layers 1 and 2 of 4."""
    released = open_released(byte_model, adapter)
    with open_engine(released, EngineOptions(dtype="float32")) as engine:
        assert engine is not None
        yield engine, released.tokenizer


def explained(opened: tuple[Engine, Tokenizer], **fields: Any) -> list[Explanation]:
    """The answers to one request."""
    request = Request(prompt=PROMPT, **{"max_tokens": 30, "ignore_eos": True, **fields})
    engine, tokenizer = opened
    [found] = explain(engine, tokenizer, [request], engine.generate([request]))
    return found


def test_threshold_mode_says_who_was_asked_and_who_emitted(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="threshold", policy=EARLY)
    assert "".join(token.piece for token in one.tokens) == one.answer.text
    heads = 0
    for index, token in enumerate(one.tokens):
        first, second, final = token.exits
        assert [each.layer for each in token.exits] == [1, 2, 4] and final.final
        assert [each.emitted for each in token.exits].count(True) == 1
        [emitter] = [each for each in token.exits if each.emitted]
        assert emitter.layer == token.token.layer
        assert emitter.agrees and emitter.answer_rank == 1 and emitter.token == token.token.id
        assert emitter.confidence == pytest.approx(token.token.confidence, abs=1e-4)
        assert final.asked is None and final.leaves is None
        if index < 2:  # min_full
            assert not first.asked and not second.asked and emitter.final
        for each in (first, second):
            assert each.leaves == (each.confidence >= (0.02 if each.layer == 1 else 0.03))
            if each.asked:  # then it emits the token exactly if it is confident enough
                assert each.emitted == each.leaves
        heads += (bool(first.asked) + bool(second.asked) + emitter.final) if index else 0
    # As many heads ran in the answer itself.
    assert one.answer.statistics["heads_per_token"] == pytest.approx(heads / (len(one.tokens) - 1))
    emitted = {share.layer: share.emitted for share in one.by_exit()}
    assert {str(layer): count for layer, count in emitted.items() if count} == one.answer.statistics["tokens_by_layer"]
    assert emitted[1] and emitted[4], "too little happens"
    assert [share.threshold for share in one.by_exit()] == [0.02, 0.03, None]


def test_departures_are_those_from_full_modes_answer(opened: tuple[Engine, Tokenizer]) -> None:
    engine, _ = opened
    [one] = explained(opened, mode="threshold", policy=ThresholdPolicy(threshold=0.01, min_full=4))
    [[full]] = engine.generate([Request(prompt=PROMPT, max_tokens=30, ignore_eos=True)])
    assert [token.id for token in one.full.tokens] == [token.id for token in full.tokens]
    place = one.agreement.departure
    assert place is not None and place >= 4
    finals = [token.exits[-1] for token in one.tokens]
    # As far as both texts are the same, the final exit says in the replay what full mode says.
    assert [each.token for each in finals[: place + 1]] == [token.id for token in full.tokens[: place + 1]]
    assert not finals[place].agrees and all(each.agrees for each in finals[:place])
    assert min(one.different) == place == min(one.full_different)
    assert f"at token {place + 1}: it says" in one.verdict()


def test_a_threshold_above_one_departs_nowhere(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="threshold", policy=ThresholdPolicy(threshold=1.5))
    assert one.agreement.equal and not one.different and not one.full_different
    assert all(token.exits[-1].emitted and token.exits[-1].agrees for token in one.tokens)
    assert one.verdict() == "Equal to full mode's answer in all tokens (30)."
    [whole] = explained(opened)
    assert whole.full is whole.answer and whole.verdict().startswith("This is full mode")
    assert {each.asked for token in whole.tokens for each in token.exits} == {None}


def test_speculative_mode_says_what_was_drafted(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="speculative", draft=Draft(exit=2, length=3))
    assert one.agreement.equal
    figures = one.answer.statistics
    drafted = [token for token in one.tokens if token.drafted]
    rejected = [token for token in one.tokens if token.token.rejected is not None]
    assert len(drafted) <= figures["accepted"] and len(rejected) == figures["judged"] - figures["accepted"] > 0
    for token in one.tokens:
        _, drafter, final = token.exits
        assert final.agrees and (final.emitted or drafter.emitted)
        if token.drafted:
            assert drafter.agrees and token.token.rejected is None
        if token.token.rejected is not None:  # the exit's most probable token was not the full model's
            assert not drafter.agrees and drafter.token == token.token.rejected and drafter.text == token.rejected


def test_accepted_drafts_of_sampled_answers_are_told(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="speculative", draft=Draft(exit=2, length=3), sampling=DRAWN)
    figures = one.answer.statistics
    drafted = [token for token in one.tokens if token.drafted]
    assert 0 < len(drafted) <= figures["accepted"]
    for token in one.tokens:
        assert [each.layer for each in token.exits if each.emitted] == [token.token.layer]
        assert token.drafted == (token.token.layer == 2)


def test_sampled_answers_have_full_modes_of_the_same_seeds(opened: tuple[Engine, Tokenizer]) -> None:
    engine, _ = opened
    found = explained(opened, mode="threshold", policy=EARLY, sampling=DRAWN, samples=2)
    [full] = engine.generate([Request(prompt=PROMPT, sampling=DRAWN, samples=2, max_tokens=30, ignore_eos=True)])
    assert [[token.id for token in one.full.tokens] for one in found] == [[t.id for t in one.tokens] for one in full]
    ranks = [each.answer_rank for one in found for token in one.tokens for each in token.exits if each.emitted]
    assert max(ranks) > 1  # a sampled token need not be the most probable one
    for one in found:
        for token in one.tokens:
            for each in token.exits:
                assert each.agrees == (each.token == token.token.id) == (each.answer_rank == 1)
                assert each.probability >= each.answer_probability


def test_only_used_exits_are_asked_but_all_speak(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="threshold", policy=ThresholdPolicy(threshold=0.01), exits=(2,))
    assert {token.token.layer for token in one.tokens} == {2, 4}
    for token in one.tokens:
        first, second, _ = token.exits
        assert first.asked is False and first.leaves is None and second.leaves is not None
    assert [share.threshold for share in one.by_exit()] == [None, 0.01, None]


def test_texts_are_those_that_the_tokens_would_add(opened: tuple[Engine, Tokenizer]) -> None:
    [one] = explained(opened, mode="threshold", policy=EARLY)
    for token in one.tokens:
        for each in token.exits:
            if each.agrees and token.piece:
                assert each.text == token.piece or "\ufffd" in token.piece
            assert each.text


def test_json_is_plain(opened: tuple[Engine, Tokenizer]) -> None:
    for fields in ({"mode": "threshold", "policy": EARLY}, {"mode": "speculative"}, {}):
        [one] = explained(opened, **fields)
        form = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        assert [each["id"] for each in form["tokens"]] == [token.id for token in one.answer.tokens]
        assert [each["final"] for each in form["exits"]] == [False, False, True]
        assert form["departure"] == one.agreement.departure
        assert ("drafted" in form["tokens"][0]) == (fields.get("mode") == "speculative")


def test_an_exit_without_numbers_is_told(opened: tuple[Engine, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = opened
    exits: Any = engine._scheduler.stages[0]._exits  # type: ignore[union-attr]
    monkeypatch.setattr(exits[2].head, "logits", lambda z: z.new_full((len(z), 258), float("nan")))
    with pytest.raises(UserError, match="^the logits after layer 2 are not finite"):
        explained(opened)


# -- the page


class Tags(HTMLParser):
    """The tags of a page, which all have to close, and the texts of the ``pre`` elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag != "meta":
            self._open.append(tag)
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.texts[-1] += data


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></pre>",
    "{0}%s{{",
    "a\u202eb",
]


@pytest.fixture(scope="module")
def early(opened: tuple[Engine, Tokenizer]) -> Explanation:
    """An answer that departs from full mode's."""
    [one] = explained(opened, mode="threshold", policy=EARLY)
    assert one.agreement.departure is not None
    return one


def with_text(one: Explanation, text: str) -> Explanation:
    """``one``, where every text is ``text``."""
    tokens = [
        replace(token, piece=text, text=text, exits=tuple(replace(each, text=text) for each in token.exits))
        for token in one.tokens
    ]
    full = replace(one.full, pieces=(text,) * len(one.full.pieces))
    return replace(one, tokens=tuple(tokens), full=full)


def test_page_shows_answers_departures_and_every_exit(early: Explanation) -> None:
    source = explanation_page([(PROMPT, early)])
    page, place = Tags(source), early.agreement.departure
    assert page.texts[0] == PROMPT and len(page.texts) == 3
    links = [each for each in page.attributes if (each.get("href") or "").startswith("#a0-")]
    rows = [each for each in page.attributes if (each.get("id") or "").startswith("a0-")]
    assert len(links) == len(rows) == len(early.tokens)
    assert [index for index, row in enumerate(rows) if row.get("class") == "part"] == [place]
    marked = {index for index, link in enumerate(links) if "different" in (link["class"] or "").split()}
    assert marked == early.different
    cells = [(each.get("class") or "").split() for each in page.attributes if each.get("style")]
    assert len(cells) == 3 * len(early.tokens)
    assert sum("emitted" in cell for cell in cells) == len(early.tokens)
    assert "leaves at 0.02" in source and "leaves at 0.03" in source


def test_page_needs_nothing_else_and_suits_any_reader(early: Explanation) -> None:
    source = explanation_page([(PROMPT, early)])
    assert not re.search(r"(?i)<(script|link|img|iframe|base|object)|src=|url\(|@import|https?:", source)
    assert set(re.findall(r'href="(.)', source)) == {"#"}
    assert "default-src 'none'" in source and "width=device-width" in source
    assert "prefers-color-scheme:dark" in source and "@media print" in source


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_on_the_page(text: str, early: Explanation) -> None:
    page = Tags(explanation_page([(text, with_text(early, text))], title=text))
    harmless = Tags(explanation_page([("a", with_text(early, "b"))], title="c"))
    assert page.tags == harmless.tags
    assert [each.keys() for each in page.attributes] == [each.keys() for each in harmless.attributes]
    assert page.texts[1] == text.replace("\u202e", "\\u202e") * len(early.tokens)


def test_page_says_what_a_reader_has_to_know(opened: tuple[Engine, Tokenizer], early: Explanation) -> None:
    certified = Coverage(status="certified", task="<b>", certificate="0" * 64)
    covered = replace(early, request=early.request.model_copy(update={"coverage": certified}))
    assert "certified for the task &lt;b&gt;." in explanation_page([(PROMPT, covered)])
    refused = certified.model_copy(update={"status": "full", "reason": "chat: True"})
    [whole] = explained(opened, coverage=refused)
    source = explanation_page([(PROMPT, whole)])
    assert "Not covered by the certificate" in source and "chat: True" in source
    [drafted] = explained(opened, mode="speculative", draft=Draft(exit=2, length=3), sampling=DRAWN)
    source = explanation_page([(PROMPT, drafted)])
    assert "which accepts or rejects it" in source
    assert "draft, accepted" in source and re.search(r"draft <span.*</span> rejected", source)
    found = explained(opened, mode="threshold", policy=EARLY, sampling=DRAWN, samples=2)
    source = explanation_page([(PROMPT, one) for one in found])
    assert "Answer 2 of 2" in source and "Tokens were sampled (temperature 1, seed 4 and up)" in source
    [margin] = explained(opened, mode="threshold", policy=ThresholdPolicy(measure="margin", threshold=0.3))
    source = explanation_page([(PROMPT, margin)])
    assert "leaves at margin" in source and re.search(r"<small>margin 0\.\d\d</small>", source)

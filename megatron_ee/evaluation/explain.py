"""Explains answers token by token: which exit emitted it, and what every other exit would have said at its position.

Each answer is replayed: prompt and answer run in one pass through all layers, and every exit is asked at every token.
So each prediction follows the same text, the answer's own. Beside it stands full mode's free-running answer, which may
go another way from the first different token on.

What an exit *would have said* is its most probable token, also where tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.evaluation.tasks.agreement import TokenAgreement, compare_tokens
from megatron_ee.evaluation.tinted import differences, marked_spaces
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import MOST_DEFERRED, ExitHistory
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.requests import Completion, Request, Token

CONTEXT = 8
"""Tokens that are decoded before a predicted one, so that its text has its leading space."""


@dataclass(frozen=True)
class Prediction:
    """What one exit says at the position of one token, from the text before it.

    Attributes:
        layer: of the exit.
        final: whether it is the final exit.
        token: id of its most probable token.
        text: the text that this token would add.
        probability: of this token, before penalty, temperature and truncation.
        confidence: in the policy's measure.
        answer_probability: of the answer's token.
        answer_rank: 1 if no token is more probable than the answer's, and so on.
        gate: probability of its gate that it agrees with the final exit; None without a gate.
        agrees: whether it says the answer's token.
        emitted: whether it emitted the token; in speculative mode, whether it drafted it.
        asked: in threshold mode, whether the token asked this exit; None in other modes and for the final exit.
        leaves: in threshold mode, whether its confidence is enough to leave here. With ``asked`` False the token runs
            on nevertheless. None as ``asked``, and for an exit that the request does not use.
    """

    layer: int
    final: bool
    token: int
    text: str
    probability: float
    confidence: float
    answer_probability: float
    answer_rank: int
    gate: float | None
    agrees: bool
    emitted: bool
    asked: bool | None
    leaves: bool | None


@dataclass(frozen=True)
class ExplainedToken:
    """One token of an answer.

    Attributes:
        token: as the engine emitted it. Its confidence may differ by rounding from that of the replayed pass.
        piece: the text that it added; empty for an end of text, and inside a character.
        text: as ``piece``, but with the name of an end of text, and the replacement character inside a character.
        rejected: in speculative mode, the text of the rejected proposal at whose position it stands; None for none.
        exits: the exits by depth; the last one is the final exit.
    """

    token: Token
    piece: str
    text: str
    rejected: str | None
    exits: tuple[Prediction, ...]

    @property
    def drafted(self) -> bool:
        """Whether an exit before the final one emitted it; in speculative mode, whether it is an accepted proposal."""
        return not self.exits[-1].emitted


@dataclass(frozen=True)
class ExitShare:
    """One exit over a whole answer.

    Attributes:
        layer: of the exit.
        final: whether it is the final exit.
        threshold: confidence at which a token leaves there in threshold mode; None if none does, or by other rules.
        emitted: number of tokens that it emitted.
        agrees: number of tokens where it says the answer's token.
        agrees_with_final: number of tokens where it says what the final exit says.
        probability: mean probability of its most probable tokens.
    """

    layer: int
    final: bool
    threshold: float | None
    emitted: int
    agrees: int
    agrees_with_final: int
    probability: float


@dataclass(frozen=True)
class Explanation:
    """One answer, explained.

    Attributes:
        request: what was asked.
        answer: what was answered.
        tokens: the answer's tokens.
        full: full mode's free-running answer to the same request; ``answer`` itself in full mode.
        agreement: of both answers, position by position.
        different: indices of the answer's tokens that full mode's answer does not have, see ``tinted.differences``.
        full_different: likewise of full mode's answer.
    """

    request: Request
    answer: Completion
    tokens: tuple[ExplainedToken, ...]
    full: Completion
    agreement: TokenAgreement
    different: frozenset[int]
    full_different: frozenset[int]

    def by_exit(self) -> list[ExitShare]:
        """Each exit over the whole answer, by depth."""
        columns = zip(*(token.exits for token in self.tokens), strict=True)
        finals = [token.exits[-1].token for token in self.tokens]
        policy, shares = self.request.policy, []
        for column in columns:
            first = column[0]
            shares.append(
                ExitShare(
                    first.layer,
                    first.final,
                    None if first.leaves is None else policy.threshold_at(first.layer),
                    sum(each.emitted for each in column),
                    sum(each.agrees for each in column),
                    sum(each.token == final for each, final in zip(column, finals, strict=True)),
                    sum(each.probability for each in column) / len(column),
                )
            )
        return shares

    def verdict(self) -> str:
        """One or two sentences: whether and where the answer departs from full mode's."""
        place, count = self.agreement.departure, len(self.tokens)
        if self.request.mode == "full":
            return "This is full mode: the final exit emitted every token."
        if place is None:
            return f"Equal to full mode's answer in all tokens ({count})."
        if place == count:
            return f"Ends after token {place}, where full mode goes on with {self.full_text(place)}."
        own = _quoted(self.tokens[place].text)
        if place == len(self.full.tokens):
            return f"Goes on with {own} at token {place + 1}, where full mode's answer ends."
        return (
            f"Departs from full mode's answer at token {place + 1}: it says {own}, full mode says "
            f"{self.full_text(place)}. {len(self.different)} of its {count} tokens are not in full mode's answer in "
            "this order."
        )

    def full_text(self, index: int) -> str:
        """What full mode says at a position, for people."""
        if index >= len(self.full.tokens):
            return "nothing more"
        ended = self.full.finish_reason == "eos" and index == len(self.full.tokens) - 1
        return "the end of the text" if ended else _quoted(self.full.pieces[index] or "\ufffd")

    def to_dict(self) -> dict[str, Any]:
        """The explanation in JSON types."""
        return {
            "departure": self.agreement.departure,
            "equal_tokens": self.agreement.equal_tokens,
            "different": sorted(self.different),
            "full": {
                "text": self.full.text,
                "token_ids": [token.id for token in self.full.tokens],
                "different": sorted(self.full_different),
            },
            "exits": [vars(share) for share in self.by_exit()],
            "tokens": [
                {
                    "id": each.token.id,
                    "text": each.text,
                    "layer": each.token.layer,
                    "confidence": each.token.confidence,
                    **(
                        {"drafted": each.drafted, "rejected": each.token.rejected, "rejected_text": each.rejected}
                        if self.request.mode == "speculative"
                        else {}
                    ),
                    "exits": [vars(prediction) for prediction in each.exits],
                }
                for each in self.tokens
            ],
        }


def explain(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], answers: Sequence[Sequence[Completion]]
) -> list[list[Explanation]]:
    """Explain answers, by request and sample.

    Each answer takes one pass over prompt and answer. Requests in other modes than full also run in full mode, with the
    same seeds.

    Args:
        engine: that gave the answers. Its exits are those that are asked.
        tokenizer: of the model.
        requests: with mode, policy and exits as they ran.
        answers: of each request, by sample.

    Raises:
        UserError: the logits of an exit or of full mode are not finite.
    """
    plain = {"mode": "full", "coverage": None, "echo": False, "logprobs": None}
    others = [request.model_copy(update=plain) for request in requests if request.mode != "full"]
    found = iter(engine.generate(others))
    pairs = [
        (request, answer, full)
        for request, given in zip(requests, answers, strict=True)
        for answer, full in zip(given, given if request.mode == "full" else next(found), strict=True)
    ]
    replays = engine.generate([_replay(engine, request, answer) for request, answer, _ in pairs])
    explained = (
        _explained(engine, tokenizer, *pair, completion.replay)
        for pair, [completion] in zip(pairs, replays, strict=True)
    )
    return [[next(explained) for _ in given] for given in answers]


def _replay(engine: Engine, request: Request, answer: Completion) -> Request:
    """The request that replays an answer."""
    prompt, _, _ = engine.check(request)
    return Request(prompt=prompt, replay_ids=tuple(token.id for token in answer.tokens), policy=request.policy)


def _explained(
    engine: Engine,
    tokenizer: Tokenizer,
    request: Request,
    answer: Completion,
    full: Completion,
    replay: Sequence[ExitReplay],
) -> Explanation:
    last = engine.num_layers
    used = tuple(spec.layer for spec in engine.exits if request.exits is None or spec.layer in request.exits)
    leaves = {exit_.depth: _leaves(request, exit_, used) for exit_ in replay}
    decisions = _decisions(request, answer.tokens, used, leaves.get(last), last)
    mine, theirs = ([token.id for token in each.tokens] for each in (answer, full))
    prompt, _, _ = engine.check(request)
    tokens = []
    for index, (token, piece) in enumerate(zip(answer.tokens, answer.pieces, strict=True)):
        depth, asked = decisions[index]
        told = {
            token.id,
            *(exit_.tokens[index] for exit_ in replay),
            *(() if token.rejected is None else (token.rejected,)),
        }
        texts = _texts(tokenizer, [*prompt[-CONTEXT:], *mine[max(0, index - CONTEXT) : index]][-CONTEXT:], told)
        exits = []
        for exit_ in replay:
            may_leave, said = leaves[exit_.depth], exit_.tokens[index]
            exits.append(
                Prediction(
                    layer=min(exit_.depth, last),
                    final=exit_.depth > last,
                    token=said,
                    text=texts[said],
                    probability=exit_.probabilities[index],
                    confidence=exit_.confidences[index],
                    answer_probability=exit_.text_probabilities[index],
                    answer_rank=exit_.text_ranks[index],
                    gate=exit_.gates[index] if exit_.gates else None,
                    agrees=said == token.id,
                    emitted=exit_.depth == depth,
                    asked=None if request.mode != "threshold" or exit_.depth > last else exit_.depth in asked,
                    leaves=None if may_leave is None else may_leave[index],
                )
            )
        rejected = None if token.rejected is None else texts[token.rejected]
        tokens.append(ExplainedToken(token, piece, piece or texts[token.id], rejected, tuple(exits)))
    agreement, marked = compare_tokens(mine, theirs), differences(mine, theirs)
    return Explanation(request, answer, tuple(tokens), full, agreement, *marked)


def _leaves(request: Request, exit_: ExitReplay, used: Sequence[int]) -> list[bool] | None:
    """By token, whether this exit is confident enough in threshold mode; None if no token may leave there."""
    if request.mode != "threshold" or exit_.depth not in used:
        return None
    shares = exit_.gates if request.policy.gated else exit_.confidences
    return [request.policy.leaves(exit_.depth, share) for share in shares]


def _decisions(
    request: Request,
    tokens: Sequence[Token],
    used: tuple[int, ...],
    leaves_at_last: Sequence[bool] | None,
    num_layers: int,
) -> list[tuple[int, set[int]]]:
    """By token, the depth of the exit that emitted it, and the depths of the exits that it asked in threshold mode.

    The policy's decisions depend on those before them alone, so they are repeated here. An exit after the last layer
    and the final exit have the same layer: the token left at the exit if it asked it and could.
    """
    history, found = ExitHistory(), []
    for index, token in enumerate(tokens):
        wanted: set[int] = set()
        if request.mode == "threshold" and history.num_left < MOST_DEFERRED:
            wanted = set(request.policy.exits_to_ask(used, index, history)).intersection(used)
        depth = token.layer
        if depth == num_layers and not (depth in wanted and leaves_at_last is not None and leaves_at_last[index]):
            depth += 1
        asked = {layer for layer in wanted if layer <= depth}
        for layer in asked - {depth}:
            history.stayed(layer, index)
        if depth in asked:
            history.left(depth, early=depth < num_layers)
        else:
            history.ran_all_layers()
        found.append((depth, asked))
    return found


def _quoted(text: str) -> str:
    return f"“{marked_spaces(text)}”"


def _texts(tokenizer: Tokenizer, before: Sequence[int], tokens: set[int]) -> dict[int, str]:
    """The text that each of ``tokens`` would add after the tokens ``before``; its name or number if it adds none."""
    start, found = tokenizer.decode(before), {}
    for token in tokens:
        text = tokenizer.decode([*before, token])
        found[token] = text[len(commonprefix([start, text])) :] or tokenizer.name_of(token) or f"[{token}]"
    return found

"""Answers to the records of tasks in several settings, in free generation, with a journal to continue from.

The records of a task run in blocks. Each block runs in every setting, one after the other in rotating order, so that
changes of the machine's speed affect all settings alike. Sequences of one block run in batches, as in serving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ee.checkpoint.journal import Entry, Journal
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.offline import run_batch
from megatron_ee.inference.policy import ExitPolicy, ThresholdPolicy
from megatron_ee.inference.requests import Completion, Mode, Request
from megatron_ee.progress import track

MAX_TOKENS = 64
BATCH = 16
BATCHES_PER_BLOCK = 4
"""Rows of a block, in batches. The last sequences of a block run in smaller and smaller batches."""
WARM_UP_TOKENS = 4
"""Tokens after each prompt of the first batch, in every setting, before anything is timed."""


@dataclass(frozen=True)
class Setting:
    """How answers are generated: greedily, in one mode.

    Attributes:
        name: unique among the settings of a run.
        mode: see ``Request``.
        policy: exit policy of threshold mode.
        exits: layers of the exits to use; None for all.
        max_tokens: maximum number of tokens of an answer.
        stop: strings that end an answer.
        groups: by group of the record, the settings that replace this one, if any. Records of other groups then run in
            full mode.
    """

    name: str
    mode: Mode = "full"
    policy: ExitPolicy = ThresholdPolicy()
    exits: tuple[int, ...] | None = None
    max_tokens: int = MAX_TOKENS
    stop: tuple[str, ...] = ()
    groups: Mapping[str, Setting] = field(default_factory=dict, hash=False)

    def of_group(self, group: str | None) -> Setting:
        """The setting for a record of this group; None for a record without a group."""
        if not self.groups:
            return self
        found = self.groups.get(group) if group is not None else None
        return replace(self, mode="full", groups={}) if found is None else found

    def request(self, prompt: tuple[int, ...], **fields: Any) -> Request:
        """A request for the continuation of token ids in this setting; ``fields`` replace the setting's own."""
        own = {"mode": self.mode, "policy": self.policy, "exits": self.exits}
        limits = {"max_tokens": self.max_tokens, "stop": self.stop}
        return Request(prompt=prompt, **{**own, **limits, **fields})

    def to_dict(self) -> dict[str, Any]:
        """The setting in JSON types."""
        policy = self.policy.model_dump(mode="json") if self.mode == "threshold" else None
        exits = None if self.exits is None else list(self.exits)
        own = {**vars(self), "policy": policy, "exits": exits, "stop": list(self.stop)}
        groups = {name: each.to_dict() for name, each in own.pop("groups").items()}
        return {**own, "policy": None, "groups": groups} if groups else own


@dataclass(frozen=True)
class TaskAnswer:
    """The answer to one record in one setting.

    Attributes:
        text: without end-of-text tokens and stop strings.
        token_ids: the emitted tokens, with one that ended the answer.
        layers: of each token, the layer of the exit that emitted it.
        confidences: of each token, see ``Token``.
        layers_per_token: decoder layers run per token after the first; None if there is only one token.
        finish_reason: see ``Completion``.
        seconds: from the submission of its request, with the wait behind others, to the last token.
    """

    text: str
    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    confidences: tuple[float, ...]
    layers_per_token: float | None
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class TimedBlock:
    """A block of records that one setting answered without interruption.

    Attributes:
        task: of the records.
        rows: number of records.
        seconds: with the passes of the prompts, by setting.
        tokens: emitted tokens, by setting.
    """

    task: str
    rows: int
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class TaskAnswers:
    """All answers.

    Attributes:
        by_setting: by the setting's name and the record's id.
        blocks: those that every setting answered without interruption.
    """

    by_setting: dict[str, dict[str, TaskAnswer]]
    blocks: tuple[TimedBlock, ...]


def answer_records(
    engine: Engine,
    records: Sequence[TaskRecord],
    settings: Sequence[Setting],
    journal: Journal | None = None,
    *,
    batch: int = BATCH,
    label: str = "answering",
) -> TaskAnswers:
    """Answer all records in all settings.

    Args:
        engine: without other requests.
        records: those of a task side by side, as from ``read_records``.
        settings: with names that differ.
        journal: of an earlier, unfinished call with the same arguments; every answer is added to it. ``entry_key`` is
            its key.
        batch: the engine's maximum number of running sequences.
        label: of the progress.

    Raises:
        ConfigError: there is not enough memory for a record, or it is too long; the message names file and line.
        UserError: the logits after a prompt are not finite.
    """
    for record in records:
        check_fits(engine, record, [_request(record, setting) for setting in settings])
    found = {} if journal is None else {entry_key(entry): entry for entry in journal.entries()}
    done = sum(("answer", each.name, record.id) in found for each in settings for record in records)
    total = len(settings) * len(records)
    if done < total:
        _warm_up(engine, records[:batch], settings)
    with track(total, "answers", label, "tokens", completed=done) as bar:
        for number, block in enumerate(_blocks(records, batch * BATCHES_PER_BLOCK)):
            turn = number % len(settings)
            for setting in (*settings[turn:], *settings[:turn]):
                left = [record for record in block if ("answer", setting.name, record.id) not in found]
                for entry in _answer_block(engine, left, setting, batch, whole=len(left) == len(block)):
                    found[entry_key(entry)] = entry
                    if journal is not None:
                        journal.append(entry)
                    if "answer" in entry:
                        bar.advance(1, len(entry["answer"]["token_ids"]))
    answers = {
        each.name: {record.id: _read(found["answer", each.name, record.id]) for record in records} for each in settings
    }
    return TaskAnswers(answers, tuple(_timed_blocks(found, records, settings, batch * BATCHES_PER_BLOCK)))


def entry_key(entry: Entry) -> Hashable:
    """The key of an entry of the journal: its kind, the setting's name and a record's id.

    Kinds are ``answer``, ``choices`` (see ``choices``) and ``block``, with the id of the block's first record.

    Raises:
        LookupError, TypeError or ValueError: it is none of these.
    """
    [kind] = [kind for kind in ("answer", "choices", "block") if kind in entry]
    return kind, str(entry["setting"]), str(entry["id"])


def check_fits(engine: Engine, record: TaskRecord, requests: Iterable[Request]) -> None:
    """Refuse a record if the engine refuses one of its requests.

    Raises:
        ConfigError: naming file and line.
    """
    try:
        for request in requests:
            engine.check(request)
    except ConfigError as error:
        raise ConfigError(f"{record.where}: {error}") from None


def _request(record: TaskRecord, setting: Setting, **fields: Any) -> Request:
    return setting.of_group(record.group).request(record.prompt_ids, **fields)


def _warm_up(engine: Engine, records: Sequence[TaskRecord], settings: Sequence[Setting]) -> None:
    for setting in settings:
        engine.generate([_request(record, setting, max_tokens=WARM_UP_TOKENS) for record in records])


def _blocks(records: Sequence[TaskRecord], most: int) -> Iterator[Sequence[TaskRecord]]:
    """Runs of records of one task, of at most ``most`` and about equal size within a task."""
    start = 0
    while start < len(records):
        task = records[start].task
        end = next((i for i in range(start, len(records)) if records[i].task != task), len(records))
        count = math.ceil((end - start) / most)
        size = math.ceil((end - start) / count)
        for first in range(start, end, size):
            yield records[first : min(first + size, end)]
        start = end


def _answer_block(
    engine: Engine, records: Sequence[TaskRecord], setting: Setting, batch: int, *, whole: bool
) -> Iterator[dict[str, Any]]:
    """The journal's entries for records of one block, and for its time if it is the ``whole`` block."""
    tokens, started = 0, time.perf_counter()
    requests = [_request(record, setting) for record in records]
    for index, [outcome] in run_batch(engine, requests, ahead=batch):
        record = records[index]
        if isinstance(outcome, str):
            raise UserError(f"{record.where}: {setting.name}: {outcome}")
        tokens += len(outcome.tokens)
        yield {"setting": setting.name, "id": record.id, "answer": _described(outcome)}
    if whole:
        seconds = time.perf_counter() - started
        time_of = {"rows": len(records), "tokens": tokens, "seconds": seconds}
        yield {"setting": setting.name, "id": records[0].id, "block": time_of}


def _described(completion: Completion) -> dict[str, Any]:
    tokens, statistics = completion.tokens, completion.statistics
    later = (len(tokens) - 1) / statistics["tokens_per_second"] if statistics["tokens_per_second"] else 0.0
    return {
        "text": completion.text,
        "token_ids": [token.id for token in tokens],
        "layers": [token.layer for token in tokens],
        "confidences": [token.confidence for token in tokens],
        "layers_per_token": statistics["layers_per_token"],
        "finish_reason": completion.finish_reason,
        "seconds": statistics["time_to_first_token"] + later,
    }


def _read(entry: Mapping[str, Any]) -> TaskAnswer:
    values = entry["answer"]
    lists = {name: tuple(values[name]) for name in ("token_ids", "layers", "confidences")}
    return TaskAnswer(**{**values, **lists})


def _timed_blocks(
    found: Mapping[Hashable, Entry], records: Sequence[TaskRecord], settings: Sequence[Setting], most: int
) -> Iterator[TimedBlock]:
    for block in _blocks(records, most):
        times = {each.name: found.get(("block", each.name, block[0].id)) for each in settings}
        timed = {name: entry["block"] for name, entry in times.items() if entry is not None}
        if len(timed) == len(settings):
            seconds, tokens = ({name: each[key] for name, each in timed.items()} for key in ("seconds", "tokens"))
            yield TimedBlock(block[0].task, len(block), seconds, tokens)

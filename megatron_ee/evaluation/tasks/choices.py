"""Multiple choice: the likelihood of each choice after the prompt, in full mode and under an exit policy.

A choice is forced token by token. Its likelihood is that of the exits that emit at its positions, so under a policy the
exits decide as they would in generation of this text. Speculative mode has full mode's likelihoods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_ee.checkpoint.journal import Journal
from megatron_ee.errors import UserError
from megatron_ee.evaluation.tasks.answers import BATCH, Setting, check_fits, entry_key
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.offline import run_batch
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.progress import track


@dataclass(frozen=True)
class ChoiceScores:
    """The choices of one record in one setting.

    Attributes:
        log_likelihoods: of each choice, the natural log-probability of its tokens after the prompt.
        mean_layers: of each choice, the mean layer of the exits that decided on its tokens.
    """

    log_likelihoods: tuple[float, ...]
    mean_layers: tuple[float, ...]

    def accuracy(self, record: TaskRecord) -> float:
        """1 if the right choice is the most likely one (the first of several)."""
        return float(_best(self.log_likelihoods) == record.answer)

    def accuracy_per_character(self, record: TaskRecord) -> float:
        """1 if the right choice has the highest log-likelihood per character, so that long choices have a chance."""
        lengths = map(len, record.choices)
        normalised = [value / length for value, length in zip(self.log_likelihoods, lengths, strict=True)]
        return float(_best(normalised) == record.answer)


def score_choices(
    engine: Engine,
    records: Sequence[TaskRecord],
    settings: Sequence[Setting],
    journal: Journal | None = None,
    *,
    batch: int = BATCH,
) -> dict[str, dict[str, ChoiceScores]]:
    """The likelihoods of the choices of all records that have any, by the setting's name and the record's id.

    Arguments and errors as for ``answers.answer_records``.
    """
    records = [record for record in records if record.choices]
    found = {} if journal is None else {entry_key(entry): entry["choices"] for entry in _choices_in(journal)}
    forced = [setting for setting in settings if setting.mode != "speculative"]
    for record in records:
        own = [each.of_group(record.group) for each in forced]
        check_fits(engine, record, [forced_request(each, *ids) for each in own for ids in record.choice_ids])
    total = len(forced) * len(records)
    done = sum(("choices", each.name, record.id) in found for each in forced for record in records)
    with track(total, "records", "scoring choices", completed=done, enabled=total > 0) as bar:
        for setting in forced:
            left = [record for record in records if ("choices", setting.name, record.id) not in found]
            for entry in _score(engine, left, setting, batch):
                found[entry_key(entry)] = entry["choices"]
                if journal is not None:
                    journal.append(entry)
                bar.advance(1)
    full = next((each.name for each in forced if each.mode == "full"), None)
    source = {each.name: full if each.mode == "speculative" else each.name for each in settings}
    return {
        name: {record.id: _read(found["choices", of, record.id]) for record in records}
        for name, of in source.items()
        if of is not None
    }


def _choices_in(journal: Journal) -> Iterator[dict[str, Any]]:
    return (entry for entry in journal.entries() if "choices" in entry)


def _score(engine: Engine, records: Sequence[TaskRecord], setting: Setting, batch: int) -> Iterator[dict[str, Any]]:
    """The journal's entry of each record, as its last choice is scored."""
    pairs = [(record, place) for record in records for place in range(len(record.choices))]
    requests = [forced_request(setting.of_group(each.group), *each.choice_ids[place]) for each, place in pairs]
    scores: dict[str, dict[int, tuple[float, float]]] = {record.id: {} for record in records}
    for index, [outcome] in run_batch(engine, requests, ahead=batch):
        record, place = pairs[index]
        if isinstance(outcome, str):
            raise UserError(f"{record.where}: {setting.name}: {outcome}")
        own = scores[record.id]
        own[place] = log_likelihood(outcome), fmean(token.layer for token in outcome.tokens)
        if len(own) == len(record.choices):
            columns = zip(*(own[number] for number in range(len(own))), strict=True)
            values = dict(zip(("log_likelihoods", "mean_layers"), map(list, columns), strict=True))
            yield {"setting": setting.name, "id": record.id, "choices": values}


def forced_request(setting: Setting, before: tuple[int, ...], text: tuple[int, ...]) -> Request:
    """A request whose answer gives ``log_likelihood`` of the token ids ``text`` after ``before``."""
    mode = "full" if setting.mode == "speculative" else setting.mode
    return setting.request(before, mode=mode, forced_ids=text, max_tokens=len(text), logprobs=0, stop=())


def log_likelihood(completion: Completion) -> float:
    """Natural log-probability of a forced text, from the completion of ``forced_request``."""
    known = [token.logprobs.forced for token in completion.tokens if token.logprobs is not None]
    return sum(value for value in known if value is not None)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _read(values: dict[str, Any]) -> ChoiceScores:
    return ChoiceScores(**{name: tuple(each) for name, each in values.items()})

"""What every exit would have said at the tokens of full mode's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ee.checkpoint.journal import Journal
from megatron_ee.errors import UserError
from megatron_ee.evaluation.calibration.candidates import ForcedAnswer
from megatron_ee.evaluation.tasks.answers import Setting, TaskAnswer, entry_key
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.offline import run_batch
from megatron_ee.inference.policy import MOST_DEFERRED, ExitPolicy
from megatron_ee.inference.requests import Completion
from megatron_ee.progress import track

ALWAYS = 1e-30
"""Threshold that every confidence reaches."""


def force_answers(
    engine: Engine,
    records: Sequence[TaskRecord],
    full: Mapping[str, TaskAnswer],
    layers: Sequence[int],
    policy: type[ExitPolicy],
    measure: Mapping[str, Any],
    journal: Journal | None,
    batch: int,
) -> list[ForcedAnswer]:
    """Force full mode's answers at each exit, in a run per exit, which is asked at every token but the first.

    Args:
        engine: without other requests.
        records: what was answered.
        full: the answers, by the records' ids.
        layers: of the exits.
        policy: kind of the policy whose confidence is read.
        measure: its field ``measure``, or nothing for the default.
        journal: as for ``answer_records``, whose entries these resemble.
        batch: the engine's maximum number of running sequences.

    Raises:
        UserError: the logits are not finite.
    """
    asks_always = policy(threshold=ALWAYS, max_deferred=MOST_DEFERRED, backoff=0, **measure)  # type: ignore[call-arg]
    settings = [
        Setting(f"asking exit {layer} at full mode's tokens", "threshold", asks_always, (layer,)) for layer in layers
    ]
    found = [_force(engine, records, full, setting, journal, batch) for setting in settings]
    forced = []
    for record in records:
        truth = np.array(full[record.id].token_ids)
        confidences, agrees = np.zeros((len(layers), len(truth))), np.zeros((len(layers), len(truth)), dtype=bool)
        for row, layer in enumerate(layers):
            answer = found[row][record.id]
            # Where the deferred tokens reach their limit, the final exit emits a token.
            confidences[row] = np.where(np.array(answer["layers"]) == layer, answer["confidences"], 0.0)
            agrees[row] = np.array(answer["token_ids"]) == truth
        forced.append(ForcedAnswer(confidences[:, 1:], agrees[:, 1:]))
    return forced


def _force(
    engine: Engine,
    records: Sequence[TaskRecord],
    full: Mapping[str, TaskAnswer],
    setting: Setting,
    journal: Journal | None,
    batch: int,
) -> dict[str, Any]:
    """What one exit says, by the records' ids."""
    done = {} if journal is None else dict(_answers_of(setting.name, journal))
    left = [record for record in records if record.id not in done]
    requests = []
    for record in left:
        forced = full[record.id].token_ids
        requests.append(setting.request(record.prompt_ids, forced_ids=forced, max_tokens=len(forced)))
    with track(len(records), "answers", setting.name, "tokens", completed=len(done)) as bar:
        for index, [outcome] in run_batch(engine, requests, ahead=batch):
            record = left[index]
            if not isinstance(outcome, Completion):
                raise UserError(f"{record.where}: {setting.name}: {outcome}")
            tokens = outcome.tokens
            done[record.id] = {
                "token_ids": [token.id for token in tokens],
                "layers": [token.layer for token in tokens],
                "confidences": [token.confidence for token in tokens],
            }
            if journal is not None:
                journal.append({"setting": setting.name, "id": record.id, "answer": done[record.id]})
            bar.advance(1, len(tokens))
    return done


def _answers_of(name: str, journal: Journal) -> Iterator[tuple[str, Any]]:
    for entry in journal.entries():
        if entry_key(entry) == ("answer", name, entry["id"]):
            yield entry["id"], entry["answer"]

"""Checks that corpora fit a model, and that they are the corpora of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ee.data.fingerprint import tokenizer_digests
from megatron_ee.data.indexed import Corpus
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.data.tokenizer_files import eos_token_ids
from megatron_ee.errors import DataError


def check_tokenizer(corpora: Sequence[tuple[str, Corpus]], model: Path) -> list[str]:
    """Check that corpora were made with the tokenizer in a model's directory.

    Args:
        corpora: pairs of the key or option that names the corpus, and the corpus.
        model: a directory. If it holds no tokenizer, nothing is checked.

    Returns:
        A notice for each corpus that does not record its tokenizer.

    Raises:
        DataError: the tokenizer or the end-of-text token differs (the message names the corpus and both), or a file of
            the model's tokenizer is damaged.
    """
    digests = tokenizer_digests(model)
    if not digests:
        return []
    ends, lines = set(eos_token_ids(model)), []
    for key, corpus in corpora:
        made = corpus.metadata
        if made is None or made.tokenizer_sha256 is None:
            lines.append(
                f"{key}: {corpus.prefix} does not record its tokenizer; make sure that it is the tokenizer of {model}"
            )
        elif made.tokenizer_sha256 not in digests:
            raise DataError(
                f"{key}: {corpus.prefix} was made with another tokenizer, {made.tokenizer}, than {model} has; prepare "
                f"it again with --tokenizer {model}"
            )
        elif made.eos_id not in ends:
            own = load_tokenizer(model).eos_id  # takes a second, so only if the result matters
            ends |= set() if own is None else {own}
            if made.eos_id not in ends:
                raise DataError(
                    f"{key}: the documents of {corpus.prefix} end with token {made.eos_id}, but the end of text of "
                    f"{model} is {' or '.join(map(str, sorted(ends)))}; prepare it again with --tokenizer {model}"
                )
    return lines


def check_data(train: Sequence[Corpus], validation: Sequence[Corpus], model: Path) -> list[str]:
    """Check the corpora of ``data.train`` and ``data.validation`` with ``check_tokenizer``.

    Returns:
        The notices of ``check_tokenizer``, and one for each corpus that is given for both training and validation.

    Raises:
        DataError: as ``check_tokenizer``.
    """
    trained, validated = _with_keys("data.train", train), _with_keys("data.validation", validation)
    lines = check_tokenizer([*trained, *validated], model)
    known = {corpus.fingerprint: f"{key}, {corpus.prefix}" for key, corpus in reversed(trained)}
    for key, corpus in validated:
        if corpus.fingerprint in known:
            lines.append(
                f"{key}: {corpus.prefix} has the same content as {known[corpus.fingerprint]}: the validation loss will "
                "not measure the exits on text that they were not trained on"
            )
    return lines


def describe_data(train: Sequence[Corpus], validation: Sequence[Corpus]) -> dict[str, list[dict[str, str]]]:
    """Identification of a run's corpora, for its checkpoints.

    Returns:
        ``path`` and ``sha256`` of each corpus, in lists named ``train`` and ``validation``.
    """
    return {
        name: [{"path": str(corpus.prefix), "sha256": corpus.fingerprint} for corpus in corpora]
        for name, corpora in (("train", train), ("validation", validation))
    }


def changed_data(recorded: Any, now: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    """Differences between two results of ``describe_data``. Paths alone are not compared.

    Args:
        recorded: from a checkpoint. Checkpoints of older versions hold nothing to compare.

    Returns:
        A description of the difference by configuration key, such as ``data.train`` or ``data.train[0]``.
    """
    changes: dict[str, str] = {}
    if not isinstance(recorded, dict):
        return changes
    for name, corpora in now.items():
        before = recorded.get(name)
        entries = before if isinstance(before, list) else []
        if len(entries) != len(corpora):
            changes[f"data.{name}"] = f"has {len(corpora)} entries, but the run was started with {len(entries)}"
            continue
        for index, (corpus, earlier) in enumerate(zip(corpora, entries, strict=True)):
            if not isinstance(earlier, dict) or corpus["sha256"] != earlier.get("sha256"):
                changes[f"data.{name}[{index}]"] = f"{corpus['path']} has other content than when the run was started"
    return changes


def _with_keys(key: str, corpora: Sequence[Corpus]) -> list[tuple[str, Corpus]]:
    return [(f"{key}[{index}]", corpus) for index, corpus in enumerate(corpora)]

"""Whether corpora suit a model, and whether they are those of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ee.config.schema import CorpusConfig, DataConfig
from megatron_ee.data.fingerprint import end_of_text_ids, tokenizer_digests
from megatron_ee.data.indexed import Corpus, open_corpus
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError


def check_tokenizer(corpora: Sequence[tuple[str, Corpus]], model: Path) -> list[str]:
    """Check that corpora were made with the tokenizer in a model's directory.

    Args:
        corpora: each with the key or option that names it.
        model: a directory; without a tokenizer in it there is nothing to compare with.

    Returns:
        A line to show for each corpus that does not say how it was made.

    Raises:
        DataError: naming the corpus and both tokenizers, or both end-of-text tokens.
    """
    digests = tokenizer_digests(model)
    if not digests:
        return []
    ends, lines = end_of_text_ids(model), []
    for key, corpus in corpora:
        made = corpus.metadata
        if made is None or made.tokenizer_sha256 is None:
            lines.append(
                f"{key}: {corpus.prefix} does not say which tokenizer it was made with; make sure that it was that of "
                f"{model}"
            )
        elif made.tokenizer_sha256 not in digests:
            raise DataError(
                f"{key}: {corpus.prefix} was made with another tokenizer, {made.tokenizer}, than {model} has; prepare "
                f"it again with --tokenizer {model}"
            )
        elif made.eos_id not in ends:
            own = load_tokenizer(model).eos_id
            ends |= set() if own is None else {own}
            if made.eos_id not in ends:
                raise DataError(
                    f"{key}: the documents of {corpus.prefix} end with token {made.eos_id}, but the end of text of "
                    f"{model} is {' or '.join(map(str, sorted(ends)))}; prepare it again with --tokenizer {model}"
                )
    return lines


def check_data(config: DataConfig, model: Path) -> list[str]:
    """``check_tokenizer`` for all corpora of a run; the lines also name those that are trained and validated on."""
    train, validation = _opened("data.train", config.train), _opened("data.validation", config.validation)
    lines = check_tokenizer([*train, *validation], model)
    keys = {corpus.fingerprint: (key, corpus.prefix) for key, corpus in reversed(train)}
    for key, corpus in validation:
        if corpus.fingerprint in keys:
            other, prefix = keys[corpus.fingerprint]
            lines.append(
                f"{key}: {corpus.prefix} has the same content as {other}, {prefix}: the validation loss will not show "
                "how the exits do on text that they were not trained on"
            )
    return lines


def describe_data(config: DataConfig) -> dict[str, list[dict[str, str]]]:
    """What identifies the corpora of a run in its checkpoints: by key the ``path`` and ``sha256`` of each."""
    return {
        name: [
            {"path": str(corpus.prefix), "sha256": corpus.fingerprint}
            for _, corpus in _opened(f"data.{name}", getattr(config, name))
        ]
        for name in ("train", "validation")
    }


def changed_data(recorded: Any, now: dict[str, list[dict[str, str]]]) -> list[str]:
    """What differs between two results of ``describe_data``, one line for each key; paths alone make no difference.

    Args:
        recorded: from a checkpoint; one that older versions wrote has nothing to compare.
    """
    if not isinstance(recorded, dict):
        return []
    lines = []
    for name, corpora in now.items():
        before = recorded.get(name)
        hashes = (
            [entry.get("sha256") for entry in before if isinstance(entry, dict)] if isinstance(before, list) else []
        )
        if len(hashes) != len(corpora):
            lines.append(f"data.{name}: has {len(corpora)} entries, but the run was started with {len(hashes)}")
            continue
        for index, (corpus, earlier) in enumerate(zip(corpora, hashes, strict=True)):
            if corpus["sha256"] != earlier:
                lines.append(f"data.{name}[{index}]: {corpus['path']} has other content than when the run was started")
    return lines


def _opened(key: str, entries: Sequence[str | CorpusConfig]) -> list[tuple[str, Corpus]]:
    paths = [entry.path if isinstance(entry, CorpusConfig) else entry for entry in entries]
    return [(f"{key}[{index}]", open_corpus(path)) for index, path in enumerate(paths)]

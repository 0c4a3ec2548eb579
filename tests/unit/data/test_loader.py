from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ee.config.schema import CorpusConfig, DataConfig
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import MicrobatchStream, PackedBlend, ValidationWindows, open_data, validation_windows
from megatron_ee.data.packing import split, whole
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import ConfigError, DataError


def numbered(count: int, length: int, start: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different: document d holds start + d * length and on."""
    return [list(range(start + d * length, start + (d + 1) * length)) for d in range(count)]


def odd(documents: list[list[int]]) -> list[list[int]]:
    """A mask that can be told from the token: odd ones are trained."""
    return [[token % 2 for token in document] for document in documents]


@pytest.fixture
def blend(write_corpus: Callable[..., Path]) -> PackedBlend:
    docs = numbered(23, 17)
    corpora = [
        open_corpus(write_corpus("a", docs, odd(docs))),
        open_corpus(write_corpus("b", numbered(40, 5, start=1000))),
    ]
    return PackedBlend([whole(corpus) for corpus in corpora], [3.0, 1.0], sequence_length=8, seed=7)


def test_labels_are_the_next_tokens_and_masks_stay_with_them(blend: PackedBlend) -> None:
    for index in range(300):
        tokens, labels, mask = blend[index]
        assert tokens.shape == labels.shape == mask.shape == (8,) and tokens.dtype == labels.dtype == np.int64
        assert np.array_equal(tokens[1:], labels[:-1])
        source, _ = blend.source(index)
        length = 17 if source == 0 else 5
        inside = labels % 1000 % length != 0  # a document goes on in order
        assert np.array_equal(labels[inside], tokens[inside] + 1)
        assert np.array_equal(mask, labels % 2 == 1 if source == 0 else np.ones(8, dtype=bool))


def test_an_epoch_gives_each_label_once_and_the_next_in_another_order(write_corpus: Callable[..., Path]) -> None:
    corpus = open_corpus(write_corpus("a", numbered(23, 17)))
    single = PackedBlend([whole(corpus)], [1.0], 8, 7)
    (count,) = single.samples_per_epoch
    assert count == (23 * 17 - 1) // 8
    epochs = [[single[e * count + i] for i in range(count)] for e in range(3)]
    orders = []
    for epoch in epochs:
        labels = np.concatenate([sample[1] for sample in epoch])
        assert len(set(labels.tolist())) == len(labels) == count * 8
        orders.append(tuple(labels.tolist()))
    assert len(set(orders)) == 3
    # Sequences of one long document do not come one after the other.
    firsts = [int(sample[0][0]) for sample in epochs[0]]
    assert firsts != sorted(firsts)


def test_seed_and_position_alone_decide(blend: PackedBlend, tmp_path: Path) -> None:
    def again(seed: int) -> PackedBlend:
        return PackedBlend([whole(open_corpus(tmp_path / n)) for n in "ab"], [3.0, 1.0], 8, seed)

    forward = [blend[i] for i in range(200)]
    other = again(7)
    for index in (199, 3, 150, 0, 77):  # in any order, and from a fresh start
        for mine, theirs in zip(forward[index], other[index], strict=True):
            assert np.array_equal(mine, theirs)
    assert any(not np.array_equal(forward[i][0], again(8)[i][0]) for i in range(5))


def test_shares_follow_the_weights(write_corpus: Callable[..., Path]) -> None:
    corpora = [open_corpus(write_corpus(f"c{n}", numbered(10, 9, 100 * n))) for n in range(3)]
    blend = PackedBlend([whole(c) for c in corpora], [5, 3, 2], 4, 1)
    for upto in (10, 100, 20_000):
        shares = Counter(blend.source(i)[0] for i in range(upto))
        for corpus, weight in enumerate((5, 3, 2)):
            assert abs(shares[corpus] - upto * weight / 10) <= 1
    # Beyond the table's first size, it goes on as before.
    assert [blend.source(i) for i in (16_383, 16_384)] == [
        PackedBlend([whole(c) for c in corpora], [5, 3, 2], 4, 1).source(i) for i in (16_383, 16_384)
    ]
    for corpus in range(3):
        places = [blend.source(i)[1] for i in range(1000) if blend.source(i)[0] == corpus]
        assert places == list(range(len(places)))


def test_each_corpus_of_a_blend_has_a_new_order_in_each_epoch(blend: PackedBlend) -> None:
    epochs: list[dict[int, list[int]]] = [{}, {}]  # by corpus, the labels of its epoch in their order
    sizes, passes = blend.samples_per_epoch, blend.passes(1000)
    places = Counter[int]()
    for index in range(1000):
        corpus, place = blend.source(index)
        assert place == places[corpus], "a corpus goes on where it was"
        places[corpus] += 1
        epoch = place // sizes[corpus]
        for labels in epochs[epoch : epoch + 1]:
            labels.setdefault(corpus, []).extend(blend[index][1].tolist())
    for corpus, size in enumerate(sizes):
        assert passes[corpus] == pytest.approx(places[corpus] / size, rel=0.01) and passes[corpus] > 2
        first, second = epochs[0][corpus], epochs[1][corpus]
        assert len(set(first)) == len(set(second)) == len(first) == len(second) == 8 * size
        assert first != second
        # Not only the sequences are shuffled anew, but the documents that they are cut from.
        assert {tuple(first[at : at + 8]) for at in range(0, len(first), 8)} != {
            tuple(second[at : at + 8]) for at in range(0, len(second), 8)
        }


def test_one_long_document_is_cut_at_other_places_in_each_epoch(write_corpus: Callable[..., Path]) -> None:
    single = PackedBlend([whole(open_corpus(write_corpus("a", numbered(1, 50))))], [1.0], 8, 7)
    (count,) = single.samples_per_epoch
    assert count == 6
    epochs = [[single[epoch * count + place] for place in range(count)] for epoch in range(8)]
    assert sorted(int(tokens[0]) for tokens, _, _ in epochs[0]) == [0, 8, 16, 24, 32, 40]
    for epoch in epochs:
        labels = np.concatenate([sample[1] for sample in epoch])
        assert len(set(labels.tolist())) == len(labels)
        for tokens, labels, _ in epoch:
            assert np.array_equal(labels, (tokens + 1) % 50)  # the end is followed by the beginning
    assert len({frozenset(int(tokens[0]) for tokens, _, _ in epoch) for epoch in epochs}) > 6


def test_a_corpus_shorter_than_a_batch_is_read_again_within_it(write_corpus: Callable[..., Path]) -> None:
    single = PackedBlend([whole(open_corpus(write_corpus("a", numbered(3, 7))))], [1.0], 4, 7)
    assert single.samples_per_epoch == (5,)
    (batch,) = MicrobatchStream(single, 16, 16).step()
    for epoch in range(3):
        labels = batch.labels[5 * epoch : 5 * epoch + 5].flatten().tolist()
        assert len(set(labels)) == 20


def test_labels_of_a_blend_are_counted(write_corpus: Callable[..., Path]) -> None:
    docs = numbered(10, 6)
    masked, plain = open_corpus(write_corpus("a", docs, odd(docs))), open_corpus(write_corpus("b", numbered(10, 5)))
    blend = PackedBlend([whole(masked), split(plain, 0.2)[0]], [1.0, 1.0], 4, 7)
    assert blend.trained_tokens == (30, 40)


def test_resuming_at_a_position_is_the_tail_of_the_whole(blend: PackedBlend) -> None:
    stream = MicrobatchStream(blend, 2, 8)
    steps = [stream.step() for _ in range(12)]
    assert stream.consumed == 96
    taken = np.concatenate([batch.tokens.numpy() for step in steps for batch in step])
    assert np.array_equal(taken, np.stack([blend[i][0] for i in range(96)]))
    resumed = MicrobatchStream(blend, 2, 8, consumed=5 * 8)
    for step in steps[5:]:
        for mine, theirs in zip(step, resumed.step(), strict=True):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.mask, theirs.mask) and mine.num_tokens == theirs.num_tokens == int(mine.mask.sum())


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_together_have_the_global_batch(blend: PackedBlend, size: int) -> None:
    alone = MicrobatchStream(blend, 2, 16)
    ranks = [MicrobatchStream(blend, 2, 16, rank, size) for rank in range(size)]
    for _ in range(5):
        expected = alone.step()
        parts = [rank.step() for rank in ranks]
        together = [parts[n % size][n // size] for n in range(len(expected))]
        assert [len(part) for part in parts] == [8 // size] * size
        for mine, theirs in zip(expected, together, strict=True):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.mask, theirs.mask)


def test_the_global_batch_does_not_depend_on_the_micro_batch(blend: PackedBlend) -> None:
    for micro in (1, 4):
        rows = torch.cat([batch.tokens for batch in MicrobatchStream(blend, micro, 8).step()])
        assert torch.equal(rows, torch.cat([batch.tokens for batch in MicrobatchStream(blend, 8, 8).step()]))
    with pytest.raises(ConfigError, match=r"tuning.global_batch_size: 8 is not a multiple of .*3 times 1"):
        MicrobatchStream(blend, 3, 8)
    with pytest.raises(ConfigError, match="2 data-parallel ranks"):
        MicrobatchStream(blend, 8, 8, 0, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 16, 90, 500])
def test_validation_scores_each_label_once(write_corpus: Callable[..., Path], length: int) -> None:
    docs = numbered(9, 10)
    corpora = [
        open_corpus(write_corpus("a", docs, odd(docs))),
        open_corpus(write_corpus("b", numbered(3, 4, start=1000))),  # shorter than one window
    ]
    windows = validation_windows(corpora, length)
    scored: list[int] = []
    for index in range(len(windows)):
        tokens, labels, mask = windows[index]
        assert tokens.shape == labels.shape == mask.shape == (length,)
        assert np.array_equal(labels[mask], tokens[mask] + 1)
        scored += labels[mask].tolist()
    expected = [t for t in range(1, 90) if t % 2] + list(range(1001, 1012))
    assert scored == expected
    batched = [b for rank in range(2) for b in windows.batches(3, rank, 2)]
    assert sorted(torch.cat([b.labels[b.mask] for b in batched]).tolist()) == sorted(expected)
    assert sum(b.num_tokens for b in batched) == len(expected)


def test_a_limit_is_shared_among_the_corpora(write_corpus: Callable[..., Path]) -> None:
    corpora = [
        open_corpus(write_corpus(name, numbered(docs, 10, start)))
        for name, docs, start in (("long", 40, 0), ("short", 2, 1000), ("longer", 80, 2000))
    ]
    windows = validation_windows(corpora, 10, limit=12)
    assert len(windows) == 12
    counts = Counter(int(windows[i][0][0]) // 1000 for i in range(12))
    assert counts == {0: 5, 1: 2, 2: 5}
    assert int(windows[0][0][0]) == 0
    assert len(validation_windows(corpora, 10, limit=10_000)) == len(validation_windows(corpora, 10)) == 122
    assert len(validation_windows(corpora, 10, limit=1)) == 1


def test_validation_fingerprint(write_corpus: Callable[..., Path]) -> None:
    one, other = (open_corpus(write_corpus(n, numbered(9, 10, s))) for n, s in (("a", 0), ("b", 1)))
    same = validation_windows([one], 8, 3).fingerprint
    assert same == validation_windows([one], 8, 3).fingerprint
    different = [
        validation_windows([other], 8, 3),
        validation_windows([one], 9, 3),
        validation_windows([one], 8, 4),
        ValidationWindows([split(one, 0.5)[1]], 8, 3),
    ]
    assert same not in {windows.fingerprint for windows in different}


def test_split_holds_out_documents_at_the_end(write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus("a", numbered(20, 10))
    data = DataConfig(train=[str(prefix)], validation_fraction=0.1, sequence_length=8)
    train, validation = open_data(data, 200)
    assert validation is not None
    held_out = {int(t) for i in range(len(validation)) for t in validation[i][1][validation[i][2]]}
    assert held_out == set(range(181, 200))
    trained = {int(t) for i in range(100) for t in train[i][0]} | {int(t) for i in range(100) for t in train[i][1]}
    assert max(trained) < 180
    with pytest.raises(DataError, match=r"validation_fraction 0.1 of 1 documents leaves none"):
        split(open_corpus(write_corpus("one", numbered(1, 50))), 0.1)
    with pytest.raises(ConfigError, match="data.validation_fraction: must lie between 0 and 1"):
        split(open_corpus(prefix), 1.5)


def test_configured_blend(write_corpus: Callable[..., Path]) -> None:
    a, b = write_corpus("a", numbered(20, 10)), write_corpus("b", numbered(20, 10, 1000))
    data = DataConfig(train=[str(a), CorpusConfig(str(b), 3.0)], validation=[str(b)], sequence_length=8)
    train, validation = open_data(data, 2000, validation_sequences=4)
    assert Counter(train.source(i)[0] for i in range(400)) == {0: 100, 1: 300}
    assert validation is not None and len(validation) == 4
    assert open_data(DataConfig(train=[str(a)], sequence_length=8), 2000)[1] is None


def test_refused(write_corpus: Callable[..., Path]) -> None:
    a = str(write_corpus("a", numbered(2, 10)))

    def refuse(kind: type[Exception], message: str, vocab: int = 100, **settings: object) -> None:
        with pytest.raises(kind, match=message):
            open_data(DataConfig(**{"train": [a], "sequence_length": 8, **settings}), vocab)  # type: ignore[arg-type]

    refuse(
        DataError,
        r"/a: holds 20 tokens to train on, less than one sequence of 21; .*data.sequence_length",
        sequence_length=20,
    )
    refuse(DataError, r"/a: holds token id 19, which is not in the model's vocabulary of 19", vocab=19)
    refuse(DataError, "gone.idx: not found", train=[a + "/../gone"])
    refuse(ConfigError, "data.train: the weight of .*/a must be positive, not 0", train=[CorpusConfig(a, 0.0)])
    refuse(ConfigError, "data.train: name at least one", train=[])
    refuse(ConfigError, "data.seed", seed=-1)
    refuse(ConfigError, "data.sequence_length: must be at least 2", sequence_length=1)
    refuse(ConfigError, "data.validation_fraction: data.validation names", validation=[a], validation_fraction=0.1)
    open_data(DataConfig(train=[a], sequence_length=19), 20)  # exactly one sequence


def test_one_rank_reads_the_corpora_that_nothing_describes(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> int:
        raise AssertionError("reads all tokens")

    monkeypatch.setattr("megatron_ee.data.indexed.Corpus.largest_id", read)
    data = DataConfig(train=[str(write_corpus("a", numbered(2, 10)))], sequence_length=8)
    open_data(data, None)
    with pytest.raises(AssertionError):
        open_data(data, 100)


def test_from_text_to_batches(
    tmp_path: Path, chat_dir: Path, texts: list[str], write_lines: Callable[..., Path]
) -> None:
    """The whole way: what is trained in packed, shuffled batches is the assistants' words."""
    conversations = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts
    ]
    prefix = tmp_path / "chat"
    prepare_corpus([write_lines("chat.jsonl", conversations)], chat_dir, prefix, chat=True)
    tokenizer = load_tokenizer(chat_dir)
    train, _ = open_data(DataConfig(train=[str(prefix)], sequence_length=64), tokenizer.vocab_size)
    header = tokenizer.encode("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n")
    for batch in MicrobatchStream(train, 4, 12).step():
        assert batch.num_tokens == int(batch.mask.sum()) > 0
        for labels, mask in zip(batch.labels.tolist(), batch.mask.tolist(), strict=True):
            places = [i for i in range(len(labels) - len(header)) if labels[i : i + len(header)] == header]
            expected = [True] * len(labels)
            for place in places:
                expected[place : place + len(header)] = [False] * len(header)
            # A header cut by the edge of the sequence cannot be told from its text.
            inside = slice(places[0], places[-1] + len(header)) if places else slice(0, 0)
            assert mask[inside] == expected[inside]

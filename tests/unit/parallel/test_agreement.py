"""Ranks that succeed or fail together, with threads in place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from megatron_ee.errors import ConfigError, DataError, UserError
from megatron_ee.parallel.agreement import each_own, together


def on_ranks(work: Callable[[int], Any], size: int = 3) -> list[Any]:
    """What ``together`` gives or raises on each rank."""
    barrier, posted = threading.Barrier(size), [None] * size
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            posted[rank] = value
            barrier.wait(10)
            return list(posted)

        try:
            outcomes[rank] = together(gather, lambda: work(rank))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return outcomes


def test_every_rank_has_all_results() -> None:
    assert on_ranks(lambda rank: rank * rank) == [[0, 1, 4]] * 3
    assert together(None, lambda: 7) == [7]


def test_own_results_stay_where_they_are() -> None:
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [value, (None, "", "")]

    assert each_own(gather, lambda: threading.current_thread()) is threading.current_thread()
    assert sent == [(None, "", "")]


def raising(by_rank: dict[int, Exception]) -> Callable[[int], None]:
    def work(rank: int) -> None:
        if rank in by_rank:
            raise by_rank[rank]

    return work


def test_one_ranks_error_is_everyones() -> None:
    outcomes = on_ranks(raising({1: DataError("corpus.bin: is gone")}))
    assert [type(error) for error in outcomes] == [DataError] * 3
    assert [str(error) for error in outcomes] == [
        "rank 1: corpus.bin: is gone",
        "corpus.bin: is gone",
        "rank 1: corpus.bin: is gone",
    ]
    assert all(error.common for error in outcomes)


def test_an_error_of_all_is_said_without_a_rank() -> None:
    outcomes = on_ranks(raising({rank: ConfigError("tuning.steps: bad") for rank in range(3)}))
    assert [str(error) for error in outcomes] == ["tuning.steps: bad"] * 3
    assert all(error.exit_status == 2 and error.common for error in outcomes)


def test_the_first_of_several_errors_is_the_one_that_others_take() -> None:
    outcomes = on_ranks(raising({1: ConfigError("one"), 2: DataError("two")}))
    assert [str(error) for error in outcomes] == ["rank 1: one", "one", "rank 1: one"]


def test_what_is_no_users_error_keeps_its_kind_where_it_happened() -> None:
    outcomes = on_ranks(raising({2: RuntimeError("a bug")}))
    assert [type(error) for error in outcomes] == [UserError, UserError, RuntimeError]
    assert str(outcomes[0]) == "rank 2: a bug"

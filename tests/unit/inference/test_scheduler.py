from __future__ import annotations

import random

from megatron_ee.inference.scheduler import MAX_PASSES_WAITED, choose_depth, next_stop


def test_the_depth_with_most_sequences_runs_next() -> None:
    assert choose_depth({0: [0, 0], 4: [0]}) == 0
    assert choose_depth({0: [0], 4: [0, 1], 8: [0]}) == 4
    assert choose_depth({7: [0]}) == 7


def test_of_equally_many_sequences_the_deepest_run_next() -> None:
    assert choose_depth({0: [0, 0], 4: [0, 0], 2: [1, 1]}) == 4


def test_a_depth_that_has_waited_long_runs_next() -> None:
    assert choose_depth({0: [0] * 9, 4: [MAX_PASSES_WAITED - 1]}) == 0
    assert choose_depth({0: [0] * 9, 4: [0, MAX_PASSES_WAITED]}) == 4
    assert choose_depth({0: [MAX_PASSES_WAITED], 2: [9], 4: [0]}) == 2
    assert choose_depth({0: [0, 0], 4: [1]}, max_waited=1) == 4


def test_no_sequence_waits_without_end() -> None:
    """Sequences that go deeper or start anew at random: none waits for more passes than depths and the cap explain."""
    rng = random.Random(0)
    stops = [0, 2, 4, 6]
    for _ in range(20):
        depths = {seq: 0 for seq in range(12)}
        waited = dict.fromkeys(depths, 0)
        longest = 0
        for _ in range(300):
            waiting = {depth: [waited[r] for r in depths if depths[r] == depth] for depth in set(depths.values())}
            chosen = choose_depth(waiting)
            for seq, depth in depths.items():
                if depth != chosen:
                    waited[seq] += 1
                    longest = max(longest, waited[seq])
                    continue
                waited[seq] = 0
                deeper = [stop for stop in stops if stop > depth]
                depths[seq] = deeper[0] if deeper and rng.random() < 0.6 else 0
        assert longest <= MAX_PASSES_WAITED + len(stops)


def test_a_token_stops_at_the_next_exit_that_it_asks_or_at_the_stage_end() -> None:
    assert next_stop(0, (2, 4), 9) == 2
    assert next_stop(2, (2, 4), 9) == 4
    assert next_stop(4, (2, 4), 9) == 9
    assert next_stop(0, (), 9) == 9
    assert next_stop(0, (12,), 9) == 9
    assert next_stop(3, (9,), 9) == 9
    assert next_stop(9, (9,), 9) == 9  # it has asked there, and goes on to the next stage

from __future__ import annotations

import random

from megatron_ee.inference.scheduling import PATIENCE, choose_place, next_stop


def test_the_place_with_most_rows_goes_on() -> None:
    assert choose_place({0: [0, 0], 4: [0]}) == 0
    assert choose_place({0: [0], 4: [0, 1], 8: [0]}) == 4
    assert choose_place({7: [0]}) == 7


def test_of_equals_the_deepest_goes_on() -> None:
    assert choose_place({0: [0, 0], 4: [0, 0], 2: [1, 1]}) == 4


def test_who_has_waited_long_goes_first() -> None:
    assert choose_place({0: [0] * 9, 4: [PATIENCE - 1]}) == 0
    assert choose_place({0: [0] * 9, 4: [0, PATIENCE]}) == 4
    assert choose_place({0: [PATIENCE], 2: [9], 4: [0]}) == 2
    assert choose_place({0: [0, 0], 4: [1]}, patience=1) == 4


def test_no_row_waits_without_end() -> None:
    """Rows that start anew and turn back at random: none lets pass more chains than places and patience explain."""
    rng = random.Random(0)
    stops = [0, 2, 4, 6]
    for _ in range(20):
        places = {row: 0 for row in range(12)}
        ages = dict.fromkeys(places, 0)
        longest = 0
        for _ in range(300):
            waiting = {place: [ages[r] for r in places if places[r] == place] for place in set(places.values())}
            chosen = choose_place(waiting)
            for row, place in places.items():
                if place != chosen:
                    ages[row] += 1
                    longest = max(longest, ages[row])
                    continue
                ages[row] = 0
                deeper = [stop for stop in stops if stop > place]
                places[row] = deeper[0] if deeper and rng.random() < 0.6 else 0
        assert longest <= PATIENCE + len(stops)


def test_a_row_stops_at_the_next_exit_that_it_asks_or_at_the_end() -> None:
    assert next_stop(0, (2, 4), 9) == 2
    assert next_stop(2, (2, 4), 9) == 4
    assert next_stop(4, (2, 4), 9) == 9
    assert next_stop(0, (), 9) == 9
    assert next_stop(0, (12,), 9) == 9
    assert next_stop(3, (9,), 9) == 9
    assert next_stop(9, (9,), 9) == 9  # it has asked there, and goes on to the next stage

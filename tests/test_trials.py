"""The fastest way that worked is chosen."""

from typing import NamedTuple

from fasttrain.trials import fastest


class Trial(NamedTuple):
    name: str
    images_per_s: float
    fault: str = ""


def test_the_fastest_that_worked_is_chosen_and_of_equals_the_first() -> None:
    trials = [Trial("a", 5), Trial("b", 9, "wrong pixels"), Trial("c", 7), Trial("d", 7)]
    assert fastest(trials) == Trial("c", 7)
    assert fastest([Trial("a", 5, "failed")]) is None and fastest([]) is None

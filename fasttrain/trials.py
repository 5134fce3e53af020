"""Chooses the fastest of several ways that were tried."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Trial(Protocol):
    """The result of trying one way."""

    @property
    def images_per_s(self) -> float:
        """The speed; 0 if the trial failed."""

    @property
    def fault(self) -> str:
        """Why the trial failed; empty if it worked."""


AnyTrial = TypeVar("AnyTrial", bound=Trial)


def fastest(trials: Iterable[AnyTrial]) -> AnyTrial | None:
    """The fastest trial that worked (the first of equal ones); None if every trial failed."""
    working = [trial for trial in trials if not trial.fault]
    return max(working, key=lambda trial: trial.images_per_s, default=None)

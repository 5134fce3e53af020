"""Choices by trial: which of several ways worked, and is the fastest."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Trial(Protocol):
    """What became of an attempt at one way."""

    @property
    def images_per_s(self) -> float:
        """Its speed; 0 if it failed."""

    @property
    def fault(self) -> str:
        """Why it failed; empty if it worked."""


AnyTrial = TypeVar("AnyTrial", bound=Trial)


def fastest(trials: Iterable[AnyTrial]) -> AnyTrial | None:
    """The first of the fastest trials that worked; None if every one failed."""
    working = [trial for trial in trials if not trial.fault]
    return max(working, key=lambda trial: trial.images_per_s, default=None)

"""Puts runs together that differ in their seed alone, and says how far their accuracy spreads."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from fasttrain import config
from reporting.runs import Run

SEED = "train.seed"


class Spread(NamedTuple):
    """Values of several runs."""

    mean: float
    deviation: float  # standard deviation of one run, with n - 1
    lowest: float
    highest: float


class Group(NamedTuple):
    """Runs with the same settings and other seeds, at the same epoch."""

    runs: list[Run]
    epochs: float  # after so many epochs
    top1: Spread  # percent
    ema_top1: Spread | None


def groups(found: Sequence[Run]) -> list[Group]:
    """The groups of two or more runs. Runs that were not evaluated yet are left out."""
    together: list[list[Run]] = []
    for run in found:
        if not run.metrics.evals:
            continue
        for others in together:
            if _belongs(run, others[0]):
                others.append(run)
                break
        else:
            together.append([run])
    return [_group(runs) for runs in together if len(runs) > 1]


def _belongs(run: Run, other: Run) -> bool:
    changes = config.differences(run.recipe, other.recipe)
    changed = {text.partition(":")[0] for text in changes}
    return changed == {SEED} and _epochs(run) == _epochs(other)


def _epochs(run: Run) -> float:
    """Epochs that were done at the last evaluation."""
    return run.epochs(run.metrics.evals[-1])


def _group(runs: list[Run]) -> Group:
    last = [run.metrics.evals[-1] for run in runs]
    averages = [line.ema_top1 for line in last if line.ema_top1 is not None]
    return Group(
        runs,
        _epochs(runs[0]),
        _spread(line.top1 for line in last),
        _spread(averages) if len(averages) == len(runs) else None,
    )


def _spread(values: Iterable[float]) -> Spread:
    known = list(values)
    return Spread(mean(known), stdev(known), min(known), max(known))

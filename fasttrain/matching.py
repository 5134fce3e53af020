"""Compares the class names of a network with those of a data set, and maps one to the other.

A row is the place of a class in the network's last layer. Evaluation needs a row for every class
of the data, or it refuses. A run that starts from weights takes over the rows that it can name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fasttrain.faults import Fault

SHOWN = 3  # names in a message


class ClassError(Fault, ValueError):
    """A network and a data set have other classes; says which, and what to do."""

    raised_on_every_rank = True


class Known(NamedTuple):
    """The classes of a network: their number, and their names where these are known."""

    number: int
    names: tuple[str, ...] | None = None


class Match(NamedTuple):
    """The network's row of each class of the data (None: it has none), and what a person is told.

    Nothing is told where the names of both are the same.
    """

    rows: list[int | None]
    said: str


Rule = Callable[[Known], Match]


@cache
def imagenet() -> tuple[str, ...]:
    """ImageNet's 1,000 class names, in the order of every published network."""
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text().split())


def to_evaluate(known: Known, data: Sequence[str], by_number: bool = False) -> Match:
    """The row of each of the data's class names, none of them None.

    Args:
        by_number: a name that is a number N means the network's class N.
    Raises:
        ClassError: some class of the data cannot be found in the network.
    """
    if not known.number:
        raise ClassError(
            "the weights have no last layer, so they tell no classes; train one, starting from "
            "these weights (recipes/finetune.toml)"
        )
    names = _names_of(known, data)
    if by_number:
        return _by_number(known.number, names, data)
    if names is None:
        return _by_place(known.number, data)
    if tuple(data) == names:
        return Match(list(range(len(data))), "")
    place = {name: row for row, name in enumerate(names)}
    if all(name in place for name in data):
        order = "of" if len(data) < len(names) else "in another order than"
        said = (
            f"evaluating {len(data):,} classes by their names, {order} the network's {len(names):,}"
        )
        return Match([place[name] for name in data], said)
    raise ClassError(_refusal(names, data))


def to_start_from(known: Known, data: Sequence[str]) -> Match:
    """The row of each of the data's class names that the network has.

    Where the network's names are not known, all rows are taken if the numbers of classes agree.
    """
    names = _names_of(known, data)
    if not known.number:
        return Match([None] * len(data), "the last layer is new: the weights have none")
    if names is None:
        if known.number == len(data):
            return Match(
                list(range(len(data))),
                f"the last layer is kept: the weights have {known.number:,} classes too, unnamed",
            )
        names = ()
    place = {name: row for row, name in enumerate(names)}
    rows = [place.get(name) for name in data]
    taken = len(data) - rows.count(None)
    counts = f"the weights have {known.number:,} classes, the data {len(data):,}"
    if tuple(data) == names:
        return Match(rows, "")
    if not taken:
        return Match(rows, f"the last layer is new: {counts}, and no name is in both")
    said = f"the last layer is taken over by class name for {taken:,} of {len(data):,} classes"
    return Match(rows, f"{said}: {counts}")


def differences(old: Sequence[str], new: Sequence[str]) -> str:
    """The first classes that differ, in one line; empty where all are the same."""
    if list(old) == list(new):
        return ""
    pairs = [
        f"class {row} is {a} there and {b} here"
        for row, (a, b) in enumerate(zip(old, new, strict=False))
        if a != b
    ]
    counts = f"{len(old):,} classes there, {len(new):,} here"
    return "; ".join([counts, *pairs[:SHOWN]])


def _names_of(known: Known, data: Sequence[str]) -> tuple[str, ...] | None:
    """The network's names; ImageNet's where it names none and could hold the data's."""
    if known.names is not None:
        return known.names
    found = imagenet()
    return found if known.number == len(found) and set(data) <= set(found) else None


def _by_place(number: int, data: Sequence[str]) -> Match:
    """Class i of the data is class i of a network that names none."""
    if number != len(data):
        raise ClassError(
            f"the network has {number:,} classes and names none, the data has {len(data):,} "
            f"({_some(data)}): which are they? Name a file that lists the network's classes, one a "
            "line, with --classes FILE" + (", or add --classes-by-number" if _numbers(data) else "")
        )
    numbers = _numbers(data)
    if numbers and numbers != sorted(numbers):
        raise ClassError(_number_advice(None, data))
    said = f"the weights name no classes: class i of the data is taken for class i of {number:,}"
    return Match(list(range(number)), said)


def _by_number(number: int, names: Sequence[str] | None, data: Sequence[str]) -> Match:
    """Number N is the network's class N, or its class that is called N."""
    theirs, ours = _numbers(names or ()), _numbers(data)
    if not theirs and not ours:
        raise ClassError(
            f"--classes-by-number: the classes are no numbers ({_some(data)}); leave it out"
        )
    for numbers in (theirs, ours):
        if len(set(numbers)) < len(numbers):
            raise ClassError("--classes-by-number: two class names are one number, as 1 and 01 are")
    places = {n: row for row, n in enumerate(theirs or range(number))}
    wanted = ours or list(range(len(data)))
    missing = [n for n in wanted if n not in places]
    if missing:
        raise ClassError(
            f"--classes-by-number: the data has a class {missing[0]}, but the network's go from "
            f"{min(places)} to {max(places)}; count the data's classes as the network does"
        )
    rows: list[int | None] = [places[n] for n in wanted]
    return Match(rows, f"classes by number: {_pairs(names, data, rows)}")


def _refusal(names: Sequence[str], data: Sequence[str]) -> str:
    """Why the data's names cannot be found among the network's, and what to do."""
    if _numbers(data) or _numbers(names):
        return _number_advice(names, data)
    missing = [name for name in data if name not in set(names)]
    return (
        f"{len(missing):,} of the data's {len(data):,} classes are unknown to the network: "
        f"{_some(missing)}; it was trained on {len(names):,}: {_some(names)}\n"
        "evaluate on data whose folders have the network's class names, or train a network for "
        "this data that starts from these weights (recipes/finetune.toml)"
    )


def _number_advice(names: Sequence[str] | None, data: Sequence[str]) -> str:
    numbers = _numbers(data)
    whose, shown = ("data", data) if numbers else ("network", names or ())
    fault = f"the {whose}'s class names are numbers ({_some(shown)})"
    if numbers and numbers != sorted(numbers):
        fault += ", and they are in the order of text, where 10 comes before 2"
    fault += "; the network names no classes" if names is None else ""
    if names is not None and len(names):
        fault += f"; the {'network' if numbers else 'data'} has {_some(names if numbers else data)}"
    return (
        f"{fault}\nif number N means the network's class N, counted from 0, add "
        "--classes-by-number; else give the folders the network's class names"
    )


def _numbers(names: Sequence[str]) -> list[int]:
    """The names as whole numbers; empty where one is none."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return [int(name) for name in names]
    return []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _pairs(names: Sequence[str] | None, data: Sequence[str], rows: Sequence[int | None]) -> str:
    """`0 is n01440764, 1 is n01443537, ...`"""
    pairs = [
        f"{name} is {names[row] if names else f'class {row}'}"
        for name, row in zip(data, rows, strict=True)
        if row is not None
    ]
    return _some(pairs)

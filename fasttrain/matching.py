"""Maps the classes of a data set to the classes of a network, by name.

A row is the index of a class in the network's last layer. Evaluation needs a row for every class
of the data. A run that starts from weights keeps the rows of the classes that it finds by name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fasttrain.faults import Fault

SHOWN = 3  # names in a message


class ClassError(Fault, ValueError):
    """The classes of a network do not fit those of the data. The message names the remedy."""

    raised_on_every_rank = True


class Known(NamedTuple):
    """The classes of a network."""

    number: int  # 0 if the weights have no last layer
    names: tuple[str, ...] | None = None  # by row; None if the weights do not name them


class Match(NamedTuple):
    """The network's rows for the classes of the data."""

    rows: list[int | None]  # one per class of the data; None if the network has no such class
    message: str  # for the user; empty if network and data have the same names in the same order


Rule = Callable[[Known], Match]


@cache
def imagenet() -> tuple[str, ...]:
    """Returns ImageNet's 1,000 class names, in the order that every published network uses."""
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text().split())


def to_evaluate(known: Known, data: Sequence[str], by_number: bool = False) -> Match:
    """Finds the row of every class of the data. No row is None.

    Args:
        data: class names by label.
        by_number: a class name that is a number N means the network's class N.
    Raises:
        ClassError: the network lacks a class of the data.
    """
    if not known.number:
        raise ClassError(
            "the weights have no last layer, so they have no classes; train one, starting from "
            "these weights (recipes/finetune.toml)"
        )
    names = _names_of(known, data)
    if by_number:
        return _by_number(known.number, names, data)
    if names is None:
        return _by_position(known.number, data)
    if tuple(data) == names:
        return Match(list(range(len(data))), "")
    row_of = {name: row for row, name in enumerate(names)}
    if all(name in row_of for name in data):
        some = f"{len(data):,} of " if len(data) < len(names) else ""
        order = "" if some else " in another order"
        message = f"evaluating {some}the network's {len(names):,} classes, found by name{order}"
        return Match([row_of[name] for name in data], message)
    raise ClassError(_refusal(names, data))


def to_start_from(known: Known, data: Sequence[str]) -> Match:
    """Finds the row of each class of the data that the network has, to start training from it.

    If the network's names are not known, all rows are kept if the numbers of classes are equal.

    Args:
        data: class names by label.
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
    row_of = {name: row for row, name in enumerate(names)}
    rows = [row_of.get(name) for name in data]
    kept = len(data) - rows.count(None)
    counts = f"the weights have {known.number:,} classes, the data {len(data):,}"
    if tuple(data) == names:
        return Match(rows, "")
    if not kept:
        return Match(rows, f"the last layer is new: {counts}, and no name is in both")
    message = f"the last layer is kept for {kept:,} of {len(data):,} classes, found by name"
    return Match(rows, f"{message}: {counts}")


def differences(old: Sequence[str], new: Sequence[str]) -> str:
    """Names the first classes that differ, in one line. Returns an empty text if none does."""
    if list(old) == list(new):
        return ""
    pairs = [
        f"class {row} is {a} there and {b} here"
        for row, (a, b) in enumerate(zip(old, new, strict=False))
        if a != b
    ]
    counts = f"{len(old):,} classes there, {len(new):,} here"
    return "; ".join([counts, *pairs[:SHOWN]])


def are_numbers(names: Sequence[str]) -> bool:
    """True if every name is a whole number, as in ImageNet-V2's folders `0` to `999`."""
    return bool(_numbers(names))


def _names_of(known: Known, data: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the network's class names.

    A network of 1,000 unnamed classes gets ImageNet's names if these include the data's.
    """
    if known.names is not None:
        return known.names
    found = imagenet()
    return found if known.number == len(found) and set(data) <= set(found) else None


def _by_position(number: int, data: Sequence[str]) -> Match:
    """Maps class i of the data to class i of a network without class names."""
    if number != len(data):
        raise ClassError(
            f"the network has {number:,} classes without names, but the data has {len(data):,} "
            f"({_some(data)}): list the network's class names in a file, one per line, and give "
            "--classes FILE" + (", or add --classes-by-number" if _numbers(data) else "")
        )
    numbers = _numbers(data)
    if numbers and numbers != sorted(numbers):
        raise ClassError(_number_advice(None, data))
    message = (
        "the weights have no class names: class i of the data is taken as the network's class i of "
        f"{number:,}"
    )
    return Match(list(range(number)), message)


def _by_number(number: int, names: Sequence[str] | None, data: Sequence[str]) -> Match:
    """Maps number N to the network's class named N. If its names are not numbers, to its class N.

    Raises:
        ClassError: no name is a number, a number occurs twice, or the network lacks a number.
    """
    network_numbers, data_numbers = _numbers(names or ()), _numbers(data)
    if not network_numbers and not data_numbers:
        raise ClassError(
            f"--classes-by-number: the class names are not numbers ({_some(data)}); leave the "
            "option out"
        )
    for numbers in (network_numbers, data_numbers):
        if len(set(numbers)) < len(numbers):
            raise ClassError(
                "--classes-by-number: two class names are the same number, such as 1 and 01; "
                "rename one"
            )
    row_of = {n: row for row, n in enumerate(network_numbers or range(number))}
    wanted = data_numbers or list(range(len(data)))
    missing = [n for n in wanted if n not in row_of]
    if missing:
        raise ClassError(
            f"--classes-by-number: the data has a class {missing[0]}, but the network's classes go "
            f"from {min(row_of)} to {max(row_of)}; number the data's classes as the network does"
        )
    rows: list[int | None] = [row_of[n] for n in wanted]
    return Match(rows, f"classes by number: {_pairs(names, data, rows)}")


def _refusal(names: Sequence[str], data: Sequence[str]) -> str:
    """Says why the network lacks classes of the data, and what to do."""
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
        fault += ", and they are sorted as text, where 10 comes before 2"
    fault += "; the network has no class names" if names is None else ""
    if names is not None and len(names):
        fault += f"; the {'network' if numbers else 'data'} has {_some(names if numbers else data)}"
    return (
        f"{fault}\nif number N means the network's class N, counted from 0, add "
        "--classes-by-number; otherwise rename the folders to the network's class names"
    )


def _numbers(names: Sequence[str]) -> list[int]:
    """Returns the names as integers; empty if one of them is not an integer."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return [int(name) for name in names]
    return []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _pairs(names: Sequence[str] | None, data: Sequence[str], rows: Sequence[int | None]) -> str:
    """Lists the first pairs of data class and network class: `0 is n01440764, 1 is n01443537`."""
    pairs = [
        f"{name} is {names[row] if names else f'class {row}'}"
        for name, row in zip(data, rows, strict=True)
        if row is not None
    ]
    return _some(pairs)

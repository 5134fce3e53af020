"""Types of command-line arguments, and options that several commands have, for argparse."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: `text` is something else.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def fraction(text: str) -> float:
    """A number above 0 and at most 1.

    Raises:
        argparse.ArgumentTypeError: `text` is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def add_precise_bn(group: argparse._ArgumentGroup) -> None:
    """Adds the options `--precise-bn` and `--precise-bn-images`."""
    group.add_argument(
        "--precise-bn",
        type=Path,
        metavar="ROOT",
        help="measure BatchNorm's statistics anew, on training images of this folder of shards",
    )
    group.add_argument(
        "--precise-bn-images",
        type=positive,
        metavar="N",
        default=12_800,
        help="the number of these images (default: %(default)s)",
    )

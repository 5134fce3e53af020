"""Gives a loader the draws and the bytes of its batches, and reads ahead of the decoder."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fasttrain import config
from fasttrain.order import Order
from fasttrain.reading import ShardReader, ranges_of
from fasttrain.sampling import Draw
from fasttrain.shards import Split

MakeReader = Callable[[Split, config.Data, int], ShardReader]


class Feed:
    """Gives the draw and the bytes of each batch in turn, and reads `read_ahead` batches ahead."""

    def __init__(
        self, order: Order, numbers: range, windows_only: bool, make_reader: MakeReader
    ) -> None:
        """
        Args:
            numbers: the batches of the order, in steps of 1.
            windows_only: give only the rows of the windows, if the images are raw.
            make_reader: its third argument is the number of batches that may be in flight.
        """
        self.order, self.split = order, order.split
        self.numbers = numbers
        self.windows_only = windows_only
        self.ahead = order.data.read_ahead
        # In flight: the batches read ahead, those in DALI's queue, one entering and one leaving it.
        in_flight = order.data.read_ahead + order.data.queue_depth + 2
        self.reader = make_reader(order.split, order.data, in_flight)
        self.draws: dict[int, Draw] = {}
        self.next = numbers.start

    def __call__(self, number: int) -> tuple[Draw, Any]:
        """Returns the draw and the bytes of a batch, as the reader's `take` gives them.

        Call it in the order of the batches' numbers.

        Raises:
            DataError: as `ShardReader.take`.
        """
        begun = self.next
        while self.next < min(number + self.ahead + 1, self.numbers.stop):
            self._start(self.next)
            self.next += 1
        for started in range(begun, self.next):  # after the batches, which are needed sooner
            self.reader.announce(self.order.pieces(started))
        draw, views = self.draws[number], self.reader.take(number)
        if self.split.store == "raw" and self.order.verified(number):
            # The images were read whole, to compare checksums. The maker needs only this part.
            _, offsets, sizes = ranges_of(self.split, draw, self.windows_only)
            starts = offsets - self.split.offset[draw.ids].astype(np.int64)
            views = self.reader.cut(views, starts, sizes)
        return draw, views

    def _start(self, number: int) -> None:
        self.draws[number] = draw = self.order.draw(number)
        verified = self.order.verified(number)
        ranges = ranges_of(self.split, draw, self.windows_only, whole=verified)
        self.reader.start(number, ranges, draw.ids.tolist() if verified else ())

    def done(self, number: int) -> Draw:
        """Frees the bytes of a batch that is decoded; returns its draw."""
        self.reader.give_back(number)
        return self.draws.pop(number)

    def close(self) -> None:
        """Closes the reader."""
        self.reader.close()

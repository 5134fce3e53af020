"""The decoder of a run: how it decodes, and the share of the GPU's hardware. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttrain import config


@dataclass(frozen=True, slots=True)
class Decoder:
    """How images are decoded. `decoding` chooses it for a run; the recipe stays as it is."""

    strategy: str  # a value of `data.decode`; or `raw`, if the shards hold pixels
    load: float | Literal["auto"] = "auto"  # see `data.hw_decoder_load`

    def load_for(self, threads: int) -> float:
        """The fraction of a batch for the GPU's hardware JPEG decoder, if it has one.

        `auto` means 7 / (7 + threads): 0.30 with 16 threads, 0.10 with 64. This is an estimate: a
        Hopper GPU's hardware decoder does the work of about seven CPU threads that decode with the
        GPU's cores.
        """
        return round(7 / (7 + threads), 2) if self.load == "auto" else self.load


def as_recipe_says(data: config.Data) -> Decoder:
    """The decoder that the recipe names; its strategy may be `auto`."""
    return Decoder(data.decode, data.hw_decoder_load)


def surest(strategies: Sequence[str]) -> str:
    """The most reliable of the strategies that the ranks chose; all ranks then use it."""
    return min(strategies, key=("cpu", "gpu_full", "gpu_window", "auto").index)

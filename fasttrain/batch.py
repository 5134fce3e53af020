"""A batch of images, and where batches are made."""

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.decoder import Decoder
from fasttrain.sampling import Draw


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Tensor  # (B, 3, S, S), channels_last, normalised; fp16 on a GPU under AMP, else fp32
    labels: Tensor  # (B,) int64
    draw: Draw | None = None  # the samples, windows and flips that it was made from
    soft: Tensor | None = None  # a teacher's labels, int16 (B, 2, k): see StoredLabels.take


class Placement(NamedTuple):
    """Where batches are made and in which form."""

    device: torch.device
    half: bool  # images as fp16 rather than fp32: see half_images
    threads: int  # CPU threads that decode
    decoder: Decoder | None = None  # None: the decoder that the recipe names


def half_images(on_gpu: bool, precision: str) -> bool:
    """True if images are fp16, which they are on a GPU under automatic mixed precision.

    Args:
        precision: `train.precision` of the recipe.
    """
    return on_gpu and precision != "no"

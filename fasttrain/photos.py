"""Turns image files into the network's input, with the pixels of an evaluation.

An evaluation decodes and resizes by DALI; this module uses Pillow, one image at a time. Its pixels
differ by at most 2/255.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasttrain import sampling, sharding
from fasttrain.description import Preprocessing
from fasttrain.faults import Fault

RAW = sharding.Policy(store="raw")


class PhotoError(Fault, ValueError):
    """An image file cannot be used. The message names the file and the fault."""


def read(path: Path) -> Image.Image:
    """Decodes an image file to 8-bit RGB, as the shards' images are.

    EXIF orientation is ignored, as in training and evaluation.

    Raises:
        PhotoError: the file cannot be read, or it holds no image.
    """
    try:
        found = sharding.prepare_image(path.read_bytes(), "val", RAW)
    except OSError as error:
        raise PhotoError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise PhotoError(f"{path}: {error}") from None
    size = found.width, found.height
    return Image.frombytes("RGB", size, found.data[-3 * math.prod(size) :])


def centre(image: Image.Image, how: Preprocessing) -> Image.Image:
    """Resizes an image and cuts its centre: `crop_px` pixels on each side."""
    width, height = (np.array([side], np.uint16) for side in image.size)
    windows = sampling.center_windows(width, height, how.resize_px, how.crop_px)
    x, y, w, h = windows[0].tolist()
    # Rounding may put the window's edge beyond the image's, which Pillow refuses.
    box = max(x, 0.0), max(y, 0.0), min(x + w, image.width), min(y + h, image.height)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return image.resize((how.crop_px, how.crop_px), filters[how.interpolation], box)


def normalised(crops: Sequence[Image.Image], how: Preprocessing) -> Tensor:
    """The network's input for images that `centre` cut: float32 `(B, 3, S, S)`."""
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))  # (B, S, S, 3)
    mean, std = (255 * torch.tensor(values) for values in (how.mean, how.std))
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()

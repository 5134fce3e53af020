"""Augmentations inside the DALI pipeline: RandAugment, TrivialAugment, colour jitter, erasing.

Nothing is drawn here: `sampling.Augment` says what happens to each image. So this module uses
DALI's single operations (`auto_aug.augmentations`), not its policies, which draw by themselves.
"""

from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations as dali
from nvidia.dali.auto_aug import core
from nvidia.dali.pipeline import do_not_convert

from fasttrain import config
from fasttrain.sampling import MAGNITUDE_BINS, Augment, augmented

FILL = 128  # value of uncovered pixels: grey, near ImageNet's mean


@core.augmentation(randomly_negate=True)
def _translate(images: Any, offset: Any, size: Any, unit: Any) -> Any:
    """Shifts by whole pixels, truncated towards 0 as torchvision does.

    Args:
        offset: (y, x), to be multiplied by `unit`.
        size: (height, width) of the images.
        unit: pixels per unit of `offset`, (y, x).
    """
    # A slice beyond the edge is ten times as fast on a CPU as DALI's operation, a warp.
    pixels = offset * unit
    pixels = math.max(math.floor(pixels), 0) + math.min(math.ceil(pixels), 0)
    return fn.slice(
        images,
        start=fn.cast(-pixels, dtype=types.INT32),
        shape=size,
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )


def _along_x(magnitude: float) -> list[float]:
    return [0, magnitude]


def _along_y(magnitude: float) -> list[float]:
    return [magnitude, 0]


# DALI's versions of these two use deprecated operators, so every run would print a warning.
@core.augmentation(randomly_negate=True, mag_to_param=dali.sharpness_kernel, param_device="auto")
def _sharpness(images: Any, kernel: Any) -> Any:
    return fn.filter(images, kernel)


@core.augmentation
def _equalize(images: Any, _: None) -> Any:
    return fn.equalize(images)


_translate_x = _translate.augmentation(mag_to_param=_along_x)
_translate_y = _translate.augmentation(mag_to_param=_along_y)

# For each operation: its magnitudes at bins 0 and 30 in RandAugment, and in TrivialAugment Wide, as
# in torchvision. A draw is an index into this table, so a new order would change every run.
OPERATIONS: dict[str, tuple[Any, tuple[float, float] | None, tuple[float, float] | None]] = {
    "translate_x": (_translate_x, (0, 150 / 331), (0, 32)),  # fraction of the width; pixels
    "translate_y": (_translate_y, (0, 150 / 331), (0, 32)),
    "shear_x": (dali.shear_x, (0, 0.3), (0, 0.99)),
    "shear_y": (dali.shear_y, (0, 0.3), (0, 0.99)),
    "rotate": (dali.rotate, (0, 30), (0, 135)),  # degrees
    "brightness": (dali.brightness, (0, 0.9), (0, 0.99)),  # factor - 1, as in the next three
    "contrast": (dali.contrast, (0, 0.9), (0, 0.99)),
    "saturation": (dali.color, (0, 0.9), (0, 0.99)),
    "sharpness": (_sharpness, (0, 0.9), (0, 0.99)),
    "posterize": (dali.posterize, (8, 4), (8, 2)),  # bits kept
    "solarize": (dali.solarize, (255, 0), (255, 0)),  # threshold
    "equalize": (_equalize, None, None),
    "auto_contrast": (dali.auto_contrast, None, None),
    "identity": (dali.identity, None, None),
}


@do_not_convert
def inputs(settings: config.Data) -> dict[str, tuple[Any, int]]:
    """DALI's dtype and the number of dimensions per image, for each `Augment` field in use."""
    kinds = {"operations": (types.INT32, 2), "jitter": (types.FLOAT, 1), "erase": (types.FLOAT, 1)}
    return {name: kinds[name] for name in augmented(settings)}


@do_not_convert
def _suite(rand: bool) -> list[Any]:
    """The operations of RandAugment or TrivialAugment Wide, in order."""
    # DALI must rewrite only the conditionals of `core.select`. Rewriting the operations that it
    # calls would take seconds.
    return [
        do_not_convert(operation.augmentation(mag_range=of_rand if rand else of_trivial).__call__)
        for operation, of_rand, of_trivial in OPERATIONS.values()
    ]


def augment(images: Any, given: Augment, settings: config.Data) -> Any:
    """Applies operations and colour jitter to uint8 images `(H, W, 3)`, inside a DALI pipeline.

    The differences from torchvision: uncovered pixels are grey, not black. The jitter's order is
    fixed: saturation and hue, then contrast, then brightness. Its contrast is relative to 128, not
    to the image's mean. Its hue rotates in YIQ, not in HSV.

    Args:
        given: nodes of the pipeline. With operations, the pipeline needs
            `enable_conditionals=True`.
    """
    if given.operations is not None:
        rand = settings.augment == "rand"
        suite = _suite(rand)
        size = images.shape(dtype=types.INT32)[0:2]
        unit = size if rand else types.Constant(np.ones(2, np.float32))
        for n in range(settings.augment_ops if rand else 1):
            operation, magnitude, negative = (given.operations[n, part] for part in range(3))
            images = core.select(
                suite,
                operation,
                data=images,
                magnitude_bin=core.signed_bin(magnitude, negative),
                num_magnitude_bins=MAGNITUDE_BINS,
                fill_value=FILL,
                size=size,
                unit=unit,
            )
    if given.jitter is not None:
        brightness, contrast, saturation, hue = (given.jitter[n] for n in range(4))
        images = fn.color_twist(
            images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
    return images


def erase(images: Any, given: Augment, half: bool) -> Any:
    """Sets the windows in `given` to 0, which is ImageNet's mean, in normalised images `(H, W, 3)`.

    Args:
        images: float32 if `given` has windows: on a GPU, DALI does not erase in float16.
        half: return float16.
    """
    if given.erase is None:
        return images
    corner, size = given.erase[0:2], given.erase[2:4]
    images = fn.erase(images, anchor=corner, shape=size, axis_names="HW", fill_value=0.0)
    # Erase after normalising: in uint8, the mean would be exact only to 1/255.
    return fn.cast(images, dtype=types.FLOAT16) if half else images

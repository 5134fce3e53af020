"""Pictures of batches for people: exact pixels, captions, grids. Pillow is imported when needed."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.reading import BadSamples
from fasttrain.resize import MEAN, STD
from fasttrain.shards import Split

if TYPE_CHECKING:
    from PIL import Image

PAPER, INK, GREY = (255, 255, 255), (24, 26, 31), (98, 104, 117)
GAP = 8  # pixels between tiles
SMALLEST_PX = 160  # smaller images are enlarged until a side has this length


def pixels(images: Tensor) -> NDArray[np.uint8]:
    """Undoes the normalisation of a loader's images, and nothing else.

    Args:
        images: `(B, 3, S, S)`, normalised, of any float dtype, on any device.
    Returns:
        RGB uint8 `(B, S, S, 3)`.
    """
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    values = (images.float() * std + mean).mul_(255).round_().clamp_(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: Tensor, labels: Sequence[str]) -> NDArray[np.uint8]:
    """One picture of a batch for an experiment tracker: a grid of images with their captions.

    Args:
        images: images of a loader, `(B, 3, S, S)`.
        labels: a caption for each image, such as its class name. A long one is shortened.
    Returns:
        RGB uint8 `(H, W, 3)`. Small images are enlarged, so that captions fit.
    """
    tiles = pixels(images)
    if len(tiles) != len(labels):
        raise ValueError(f"{len(tiles)} images need as many labels, not {len(labels)}")
    factor = enlargement(tiles.shape[1])
    side, caption = factor * tiles.shape[1], 22
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = -(-len(tiles) // columns)
    step_x, step_y = side + GAP, side + caption + GAP
    canvas = blank(columns * step_x + GAP, rows * step_y + GAP)
    for number, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = GAP + number % columns * step_x, GAP + number // columns * step_y
        canvas.paste(enlarged(tile, factor), (x, y))
        write(canvas, (x, y + side + 3), label, width=side)
    return np.array(canvas)


def original(split: Split, sample: int) -> "Image.Image":
    """Reads a stored image from its shard, as RGB, without turning it by its EXIF orientation.

    Raises:
        BadSamples: the shard cannot be read, or the image is damaged.
    """
    from PIL import Image

    try:
        with split.shard_paths[split.shard[sample]].open("rb") as file:
            file.seek(int(split.offset[sample]))
            data = file.read(int(split.size[sample]))
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow documents no full list
        raise BadSamples(split, {sample: str(error)}) from None


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


def blank(width: int, height: int, colour: tuple[int, int, int] = PAPER) -> "Image.Image":
    """An empty picture."""
    from PIL import Image

    return Image.new("RGB", (width, height), colour)


def enlargement(px: int) -> int:
    """The whole number by which images of side `px` are enlarged."""
    return max(1, -(-SMALLEST_PX // px))


def enlarged(tile: NDArray[np.uint8], factor: int) -> "Image.Image":
    """An image `(S, S, 3)` in which each pixel becomes a square of `factor` x `factor` pixels."""
    from PIL import Image

    return Image.fromarray(tile.repeat(factor, 0).repeat(factor, 1))


@lru_cache
def font(size: int, plain: bool = True) -> Any:
    """A font of this height in pixels.

    Args:
        plain: Pillow's own font, which has little more than ASCII. False: a font with other
            alphabets, if this machine has one.
    """
    from PIL import ImageFont

    if not plain:
        try:
            return ImageFont.truetype("DejaVuSans.ttf", size)
        except OSError:  # it is not installed here
            pass
    return ImageFont.load_default(size)


def write(
    canvas: "Image.Image",
    at: tuple[int, int],
    text: str,
    size: int = 15,
    colour: tuple[int, int, int] = INK,
    width: int = 0,
) -> None:
    """Writes a line of text.

    Args:
        at: the upper left corner (x, y).
        size: height of the font in pixels.
        width: the text is shortened to this many pixels; 0 does not shorten it.
    """
    from PIL import ImageDraw

    chosen = font(size, text.isascii())
    if width and chosen.getlength(text) > width:
        while text and chosen.getlength(f"{text}...") > width:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    ImageDraw.Draw(canvas).text(at, text, fill=colour, font=chosen)


def lines_of(text: str, size: int, width: int) -> list[str]:
    """Breaks a text between words into lines of at most `width` pixels."""
    lines, chosen = [""], font(size, text.isascii())
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and chosen.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

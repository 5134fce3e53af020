"""Classifies images with a trained network.

    python tools/predict.py MODEL IMAGE [IMAGE ...]

MODEL is a run folder, a checkpoint, a file that export.py wrote (.safetensors, .pth, .onnx, .pt2,
.pte), its folder for the Hub, or any other file of weights (--recipe then describes the network).
IMAGE is an image file, or a folder, in which all image files are found.

The pixels are those of an evaluation, to within 2/255. As in training, EXIF rotation is ignored: a
photograph that was taken with a turned camera is seen as it was stored. An image that cannot be
read is named, the others are classified, and the exit status is 2.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fasttrain import config
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError, Fault, stop

if TYPE_CHECKING:
    from PIL import Image

    from fasttrain.deployed import Deployed

BATCH = 32
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # in folders


class Guess(NamedTuple):
    """A class that an image may have."""

    name: str  # as the data set calls it
    english: str  # "" if it has no other name
    probability: float

    @property
    def label(self) -> str:
        """The name for people: `n02123045 tabby`."""
        return f"{self.name} {self.english}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="OUT",
        help="draw the result: a .png, .jpg or .webp file",
    )
    parser.add_argument("--recipe", type=Path, help="the recipe of a file of weights")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights of the last update, not their moving average",
    )
    arguments = parser.parse_args()
    try:
        paths = check(arguments)
        faults = predict(arguments, paths)
    except Fault as fault:
        stop(str(fault))
    if faults:
        stop("\n".join(faults))


def check(arguments: argparse.Namespace) -> list[Path]:
    """Checks the arguments, before torch is imported. Returns the image files.

    Raises:
        ConfigError: a file or folder is missing, or a suffix is unknown.
    """
    if not arguments.model.exists():
        raise ConfigError(
            f"{arguments.model}: there is no such file or folder; name a run folder, a checkpoint, "
            "or a file that tools/export.py wrote"
        )
    if (out := arguments.draw) is not None:
        if out.suffix not in (".png", ".jpg", ".webp"):
            raise ConfigError(f"--draw {out}: the picture must be .png, .jpg or .webp")
        if not out.absolute().parent.is_dir():
            raise ConfigError(f"--draw {out}: there is no such folder; make it first")
    return [path for given in arguments.images for path in files_of(given)]


def files_of(path: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; or the file itself.

    Raises:
        ConfigError: the folder holds no image file.
    """
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"{path} holds no image file ({', '.join(sorted(SUFFIXES))})")
    return found


def predict(arguments: argparse.Namespace, paths: Sequence[Path]) -> list[str]:
    """Classifies the images and prints the result.

    Returns:
        A line for each image that could not be read.
    Raises:
        Fault: the network cannot be opened, or the picture cannot be written.
    """
    from fasttrain import deployed

    recipe = config.load(arguments.recipe) if arguments.recipe else None
    network = deployed.open_network(arguments.model, not arguments.no_ema, recipe, say)
    faults: list[str] = []
    drawn: list[tuple[Image.Image, str, list[Guess]]] = []
    for path, image, guesses in classified(network, paths, arguments.top, faults):
        sys.stdout.write(as_json(path, guesses) if arguments.json else as_text(path, guesses))
        if arguments.draw:
            drawn.append((image, path.name, guesses))
    if drawn:
        draw(drawn, arguments.draw)
    return faults


def classified(
    network: "Deployed", paths: Sequence[Path], top: int, faults: list[str]
) -> Iterator[tuple[Path, "Image.Image", list[Guess]]]:
    """Yields each image's path, the pixels that the network sees, and the likeliest classes.

    Args:
        top: how many classes.
        faults: receives a line for each image that cannot be read.
    """
    from fasttrain import description, photos

    told = network.description
    english = description.readable(told.classes)
    names = told.classes or tuple(f"class {row}" for row in range(told.num_classes))
    for first in range(0, len(paths), BATCH):
        read: list[tuple[Path, Image.Image]] = []
        for path in paths[first : first + BATCH]:
            try:
                read.append((path, photos.centre(photos.read(path), told.preprocessing)))
            except photos.PhotoError as fault:
                faults.append(str(fault))
        if not read:
            continue
        batch = photos.normalised([image for _, image in read], told.preprocessing)
        best = network.logits(batch).float().softmax(1).topk(min(top, len(names)))
        rows = zip(read, best.values.tolist(), best.indices.tolist(), strict=True)
        for (path, image), values, indices in rows:
            guesses = [
                Guess(names[row], english.get(names[row], ""), value)
                for row, value in zip(indices, values, strict=True)
            ]
            yield path, image, guesses


def as_json(path: Path, guesses: Sequence[Guess]) -> str:
    """A line of JSON: the image, and its classes from the likeliest one on."""
    top: list[dict[str, Any]] = [
        {"class": guess.name}
        | ({"name": guess.english} if guess.english else {})
        | {"probability": round(guess.probability, 6)}
        for guess in guesses
    ]
    return json.dumps({"image": str(path), "top": top}) + "\n"


def as_text(path: Path, guesses: Sequence[Guess]) -> str:
    """Lines for people: the image, and its classes with their probabilities."""
    lines = [f"  {100 * guess.probability:5.1f} %  {guess.label}" for guess in guesses]
    return "\n".join([str(path), *lines]) + "\n"


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------

TILE, BARS, ROW, MARGIN = 224, 340, 30, 16  # pixels: image, its bars, one bar, space around
COLUMNS = 2
MOST = 60  # images in a picture
INK, PALE, BAR, FIRST = "#1f2933", "#eef1f4", "#a9bdd3", "#3f6ea8"


def draw(drawn: Sequence[tuple["Image.Image", str, list[Guess]]], out: Path) -> None:
    """Draws the images beside bars of their probabilities, and writes the picture.

    Raises:
        ConfigError: the picture cannot be written.
    """
    import io

    from PIL import Image, ImageDraw, ImageFont

    from fasttrain import files

    if len(drawn) > MOST:
        say(f"the picture shows the first {MOST} of {len(drawn):,} images")
        drawn = drawn[:MOST]
    bars = max(len(guesses) for _, _, guesses in drawn)
    width, height = TILE + BARS + 2 * MARGIN, max(TILE, ROW * (bars + 1)) + MARGIN
    columns = min(COLUMNS, len(drawn))
    size = columns * width + MARGIN, -(-len(drawn) // columns) * height + MARGIN
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(15)
    for number, (image, title, guesses) in enumerate(drawn):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * width, MARGIN + row * height
        picture.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
        left = x + TILE + MARGIN
        pen.text((left, y), fitting(pen, title, BARS), fill=INK)
        for place, guess in enumerate(guesses, 1):
            top = y + place * ROW
            pen.rectangle((left, top, left + BARS, top + ROW - 5), fill=PALE)
            length = round(BARS * guess.probability)
            if length:
                colour = FIRST if place == 1 else BAR
                pen.rectangle((left, top + ROW - 9, left + length, top + ROW - 5), fill=colour)
            share = f"{100 * guess.probability:.1f} %"
            space = BARS - 20 - pen.textlength(share)
            pen.text((left + 6, top + 2), fitting(pen, guess.label, space), fill=INK)
            pen.text((left + BARS - 6, top + 2), share, fill=INK, anchor="ra")
    buffer = io.BytesIO()
    picture.save(buffer, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[out.suffix], quality=90)
    try:
        files.write_bytes(out, buffer.getvalue())
    except OSError as error:
        raise ConfigError(f"--draw {out}: cannot be written ({error.strerror})") from None


def fitting(pen: Any, text: str, width: float) -> str:
    """The text, cut at its end if it is wider than `width` pixels."""
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()

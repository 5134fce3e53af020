"""Makes the demo's data set: JPEGs of handwritten digits, and shards of them.

    python tools/make_digits.py [OUT]

The digits come with scikit-learn, so nothing is downloaded. They are 1,797 scans of 8 x 8 pixels,
which are enlarged to 64 x 64. One in five is held out for validation. The shards are written to
OUT, and the JPEGs to OUT-images. If OUT holds the data set already, the command does nothing. After
a kill, the same command writes what is missing.

Source: https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak, 1998), test part.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasttrain import rng, sharding, shards, sources
from fasttrain.faults import Fault, stop

IMAGE_PX = 64
HELD_OUT = 5  # one image in five is for validation


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the data set in the folder given on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=shards.DIGITS,
        metavar="OUT",
        help="folder of the shards (default: %(default)s, where recipes/demo.toml looks for them)",
    )
    out = parser.parse_args(argv).out
    if (out / shards.MANIFEST).exists() and not (out / shards.UNFINISHED).exists():
        say(f"{out} holds a finished data set already; nothing to do")
        return
    try:
        make(out)
    except Fault as fault:
        stop(str(fault))
    except OSError as error:
        stop(f"cannot write the digits: {error}; solve that and run the same command again")


def make(out: Path) -> None:
    """Writes the JPEGs to `out`-images and the shards to `out`.

    Raises:
        ShardError: scikit-learn is missing, or `out` holds other files.
        OSError: a folder cannot be written.
    """
    photographs = out.with_name(f"{out.name}-images")
    say(f"writing photographs of handwritten digits to {photographs}, and their shards to {out}")
    write_photographs(photographs)
    source = sources.scan(photographs, "imagefolder", out, list, say)
    sharding.write_dataset(source, out)


def write_photographs(folder: Path) -> None:
    """Writes the digits as an ImageFolder: `folder`/<split>/<digit>/<number>.jpg.

    Leaves a complete file alone. Its modification time must not change, because a sharding that was
    killed resumes only if the source is unchanged.

    Raises:
        ShardError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise shards.ShardError(
            "scikit-learn is not installed, and the digits come with it; install it with\n"
            "    pip install -e '.[demo]'"
        ) from None
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8); were 0 to 16
    order = rng.permutation(0, rng.Stream.SHARDS, 1, len(images))
    for rank, number in enumerate(order.tolist()):
        split = "val" if rank % HELD_OUT == 0 else "train"
        path = folder / split / str(digits.target[number]) / f"{number:04d}.jpg"
        data = as_jpeg(images[number])
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def as_jpeg(pixels: np.ndarray) -> bytes:
    """Encodes uint8 grey levels (8, 8) as a JPEG of IMAGE_PX x IMAGE_PX pixels."""
    from PIL import Image

    image = Image.fromarray(pixels).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


def say(text: str) -> None:
    """Prints a line and flushes it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

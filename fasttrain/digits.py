"""The demo's data set: scikit-learn's handwritten digits as JPEGs, then as shards.

1,797 scans of 8 x 8 pixels from the UCI repository, enlarged to 64 px. A fifth is held out.

Source: https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak, 1998), test part.
"""

from pathlib import Path

import numpy as np

from fasttrain import rng, sharding, shards, sources

IMAGE_PX = 64
HELD_OUT = 5  # one image in so many is for validation


def prepare(root: Path) -> None:
    """Makes the data set in `root`, and the photographs it was made from in `root`-images.

    Raises:
        ShardError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise shards.ShardError(
            "the demo's digits come with scikit-learn: pip install -e '.[demo]'"
        ) from None
    from PIL import Image

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), was 0 to 16
    folder = root.with_name(f"{root.name}-images")
    order = rng.permutation(0, rng.Stream.SHARDS, 1, len(images))
    for rank, number in enumerate(order.tolist()):
        split = "val" if rank % HELD_OUT == 0 else "train"
        path = folder / split / str(digits.target[number]) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(images[number]).resize(
            (IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC
        )
        image.save(path, quality=90)
    source = sources.scan(folder, "imagefolder", root, list, print)
    sharding.write_dataset(source, root)

"""Writes sources of a few images, as folders or WebDataset tars, and lists them."""

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from fasttrain import sources
from fasttrain.listing import Options


def image(shade: int = 0) -> bytes:
    """A PNG of 8 x 8 grey pixels."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, *names: str) -> Path:
    """Writes an image under every name, or a text if the name ends in .txt."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if name.endswith(".txt") else image())
    return root


def scan(root: Path, **options: Any) -> tuple[sources.Source, list[str]]:
    """Recognises and lists the source at `root`. Returns it, and what was printed meanwhile."""
    said: list[str] = []
    form = sources.recognise(root)
    source = sources.scan(root, form, root, list, said.append, Options(**options))
    return source, said


def names(source: sources.Source) -> dict[str, list[str]]:
    """The names of the images of each split."""
    return {split: listing.names for split, listing in source.splits.items()}


Members = list[tuple[str, bytes]]  # names and contents of the files of a tar


def sample(key: str, label: object, end: str = "cls") -> Members:
    """An image and its label, in a member with the suffix `end`."""
    return [(f"{key}.png", image()), (f"{key}.{end}", str(label).encode())]


def samples(*labels: object) -> Members:
    """One sample for each label, with the keys 0000, 0001, ..."""
    return [member for n, label in enumerate(labels) for member in sample(f"{n:04d}", label)]


def tar(path: Path, members: Members, **options: Any) -> Path:
    """Writes a tar and the folders above it. `options` are those of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pair(root: Path, train: Members, val: Members | None = None) -> Path:
    """Writes a training and a validation tar; by default val holds the first training sample."""
    tar(root / "train-0.tar", train)
    tar(root / "val-0.tar", train[:2] if val is None else val)
    return root

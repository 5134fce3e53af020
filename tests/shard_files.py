"""Reads and changes the files of a data set."""

import hashlib
import json
import shutil
from pathlib import Path

from fasttrain import shards


def files_of(root: Path) -> dict[str, str]:
    """The sha256 of each file in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


def expected_samples(root: Path, name: str) -> list[tuple[int, bytes]]:
    """Label and image bytes of every sample of a split, in the order of its index."""
    split = shards.open_split(root, name)
    tars = [path.read_bytes() for path in split.shard_paths]
    places = zip(split.shard, split.offset, split.size, split.label, strict=True)
    return [(int(n), tars[s][int(o) : int(o) + int(z)]) for s, o, z, n in places]


def renamed(dataset: Path, names: list[str], to: Path) -> Path:
    """Copies a data set to `to` and gives its classes other names."""
    shutil.copytree(dataset, to)
    manifest = json.loads((to / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps(manifest | {"classes": names}))
    return to

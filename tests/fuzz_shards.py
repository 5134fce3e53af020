"""Coverage-guided fuzzing of the readers of manifest and index.

    pip install atheris
    python tests/fuzz_shards.py -max_total_time=300

The first byte of an input says which file it is, and whether the rest is its bytes or what to
change in it; what must hold is in test_properties.py.
"""

import io
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["fasttrain.shards"]):
    from fasttrain import shards  # noqa: F401

from conftest import ignore
from PIL import Image
from test_properties import CHANGES, Choices, open_with

from fasttrain import sharding, sources

NAMES = tuple(CHANGES)
VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    2**64,
    0.5,
    "",
    "../x",
    "train-000000.tar",
    "0" * 64,
    [],
    {},
    [1],
    [[]],
)


def make(root: Path) -> Path:
    """A data set of two classes and a few images."""
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            path = root / "folder" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            Image.new("RGB", (8 + number, 9), (number, 2, 3)).save(data, "JPEG")
            path.write_bytes(data.getvalue())
    out = root / "shards"
    out.mkdir()
    form = sources.recognise(root / "folder")
    listed = sources.scan(root / "folder", form, out, lambda tasks: [t() for t in tasks], ignore)
    sharding.write_dataset(listed, out, build=sharding.Build(shard_size=3))
    return out


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder))
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for place, name in enumerate(NAMES):
            (corpus / name).write_bytes(bytes([place]) + (root / name).read_bytes())
            (corpus / f"changes-{name}").write_bytes(bytes([place + 2]) + bytes(range(64)))

        def one_input(data: bytes) -> None:
            if not data:
                return
            name, content = NAMES[data[0] % 2], data[1:]
            if data[0] & 2:
                source = atheris.FuzzedDataProvider(content)
                choices = Choices(
                    lambda limit: source.ConsumeIntInRange(0, limit - 1),
                    lambda: source.PickValueInList(list(VALUES)),
                )
                content = CHANGES[name]((root / name).read_bytes(), choices)
            open_with(root, name, content)

        atheris.Setup(
            [*sys.argv, "-max_len=8192", "-keep_seed=1", "-len_control=0", str(corpus)], one_input
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()

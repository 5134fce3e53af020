"""Parquet files of labelled images, as Hugging Face distributes data sets."""

from collections.abc import Iterator
from pathlib import Path

from fasttrain.shards import ShardError
from fasttrain.spool import Job

SPLIT_WORDS = {"train": "train", "validation": "val", "val": "val"}


def files(root: Path) -> tuple[list[Job], int]:
    """The files at `root` with their splits, and the number of files of other splits.

    Raises:
        ShardError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ShardError(
            "parquet files are read with pyarrow: pip install -e '.[sources]'"
        ) from None
    jobs, others = [], 0
    for path in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        split = SPLIT_WORDS.get(path.name.split("-")[0])
        if split:
            jobs.append(Job(root, path.relative_to(root).as_posix(), split))
        else:
            others += 1
    return jobs, others


def read(job: Job) -> Iterator[tuple[str, int, bytes]]:
    """Name, label and bytes of every image of a file."""
    from pyarrow import parquet

    row = 0
    with parquet.ParquetFile(job.path) as file:
        for batch in file.iter_batches(batch_size=64, columns=["image", "label"]):
            for item in batch.to_pylist():
                name = item["image"].get("path") or f"{job.path.stem}-{row:06d}"
                yield Path(name).name, item["label"], item["image"]["bytes"]
                row += 1

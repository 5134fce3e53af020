"""The stage `input`: fasttrain's batches from every data set, decoded in every way."""

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.input import stored_shards
from benchmarks.pipelines import InputJob
from benchmarks.record.journal import Run
from fasttrain import sharding, shards, sources
from fasttrain.shards import Split

LOADS = (0.2, 0.35, 0.65, 0.0)  # values of data.hw_decoder_load


def stage(run: Run, data: list[Split]) -> None:
    """Measures fasttrain's input on every data set, in equal shares of the time."""
    # Raw shards come first: they feed the fastest updates, and the least is known about them.
    sets = sorted(data or [made_up(run)], key=lambda split: split.store != "raw")
    stop_at = run.stop_at
    for number, split in enumerate(sets):
        run.stop_at = time.monotonic() + (stop_at - time.monotonic()) / (len(sets) - number)
        kind = {"data": split.root.name, "store": split.store, **described(split)}
        batch = min(max(run.arguments.batch), split.num_samples)
        for decode, load, fancy in strategies(run, split):
            changes: dict[str, Any] = {"decode": decode, "load": load, "fancy": fancy}
            job = input_job(run, split, batch).model_copy(update=changes)
            run.measure(job, "input", **kind, **changes, batch=batch)
        if split.store == "raw":
            run.measure(job, "packed", **kind, batch=batch)


def input_job(run: Run, split: Split, batch: int) -> InputJob:
    """The job of fasttrain's pipeline on a data set."""
    arguments = run.arguments
    least = (64 if split.store == "raw" else 8) * batch  # about a second
    return InputJob(
        name="fasttrain",
        shards=split.root,
        folder=None,
        threads=arguments.threads,
        batch=batch,
        crop_px=arguments.crop_px,
        images=max(arguments.images or 0, least) if run.gpu else arguments.images or 4 * batch,
        device="cuda:0" if run.gpu else "cpu",
        half=run.gpu,
    )


def described(split: Split) -> dict[str, Any]:
    """What a line says about the images of a data set."""
    stored = stored_shards(split)
    return {
        "kb_per_image": round(stored.bytes_per_image / 1e3, 1),
        "mpx_per_image": round(stored.mean_pixels / 1e6, 3),
    }


def strategies(run: Run, split: Split) -> Iterator[tuple[str, float | None, bool]]:
    """Values of `data.decode`, `hw_decoder_load` and `jpeg_fancy_upsampling` to measure."""
    if split.store == "raw" or not run.gpu:
        yield "auto", None, False
        return
    for load in LOADS:
        yield "gpu_full", load, False
        yield "gpu_window", load, False
        if load == LOADS[0]:
            yield "cpu", None, False
            yield "gpu_full", load, True
            yield "gpu_window", load, True


def made_up(run: Run) -> Split:
    """Raw shards of random pictures, for a record that is given no data set."""
    root = run.arguments.scratch / "made-up"
    if not (root / shards.MANIFEST).exists():
        folder = run.arguments.scratch / "pictures"
        write_pictures(folder, run)
        source = sources.scan(folder, "imagefolder", root, list, lambda text: None)
        root.mkdir(exist_ok=True)
        policy = sharding.Policy(store="raw")
        sharding.write_dataset(source, root, policy, sharding.Build(workers=run.arguments.threads))
        shutil.rmtree(folder)
    return shards.open_split(root, "train")


def write_pictures(folder: Path, run: Run) -> None:
    """Writes an ImageFolder of random pictures, with one validation image for each class."""
    number = 2048 if run.gpu else 4 * max(run.arguments.batch)
    classes = min(1000, number)
    pictures = random_jpegs(min(64, number), round(run.arguments.crop_px * 256 / 224))
    for split, images in (("train", number), ("val", classes)):
        for image in range(images):
            path = folder / split / f"{image % classes:04d}" / f"{image}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pictures[image % len(pictures)])


def random_jpegs(number: int, short_px: int) -> list[bytes]:
    """JPEGs of smooth noise, 4/3 as wide as high."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        noise = rng.integers(0, 256, (8, 10, 3)).astype(np.uint8)
        encoded = io.BytesIO()
        image = Image.fromarray(noise).resize(
            (short_px * 4 // 3, short_px), Image.Resampling.BICUBIC
        )
        image.save(encoded, "jpeg")
        found.append(encoded.getvalue())
    return found

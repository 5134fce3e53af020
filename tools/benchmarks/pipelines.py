"""The input pipelines that `benchmark.py input` compares: fasttrain's and those of other libraries.

Each is an endless generator of (images, labels) in random order. All do the same work: read,
decode, cut a random resized crop, flip and normalise. Images are float32 of shape (B, 3, S, S),
labels are int64 of shape (B,). Where a library offers several ways, its fastest one is set up.
A pipeline imports its library itself, because that is part of the time to the first batch.
"""

import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import own_process
from fasttrain import config, sampling, schedule, shards
from fasttrain.schedule import Plan
from fasttrain.shards import Split

Batches = Generator[tuple[Any, Any], None, None]  # torch's tensors

SHUFFLED = 2048  # images in the buffer of DALI's reader; webdataset's has 1000 per worker
CACHE_LINE = 64  # bytes


class InputJob(own_process.Job, frozen=True):
    """A pipeline by its name, with its data and settings."""

    shards: Path
    folder: Path | None
    threads: int
    batch: int
    crop_px: int
    images: int
    raw: bool = False  # only read, do not decode
    device: str = "cpu"
    # The rest are settings of fasttrain.
    queue_depth: int = 2  # the default of the other libraries is 2 as well
    decode: str = "auto"
    half: bool = False  # images as float16, on a GPU
    load: float | None = None  # hw_decoder_load
    fancy: bool = False  # jpeg_fancy_upsampling

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def batches(self) -> Batches:
        """The batches of the pipeline."""
        return (READERS if self.raw else PIPELINES)[self.name](self)


# --------------------------------------------------------------------------------------------------
# fasttrain
# --------------------------------------------------------------------------------------------------


def fasttrain(job: InputJob) -> Batches:
    """fasttrain's loader, as a run uses it."""
    import torch

    from fasttrain import loaders
    from fasttrain.batch import Placement

    split = shards.open_split(job.shards, "train")
    place = Placement(torch.device(job.device), half=job.half, threads=job.threads)
    for batch in loaders.train_batches(split, settings(job), endless(job, split), 0, place, 0):
        yield batch.images, batch.labels


def settings(job: InputJob) -> config.Data:
    """The [data] section of fasttrain's recipe for a job."""
    chosen = job.model_dump(include={"crop_px", "threads", "queue_depth", "decode"})
    if job.load is not None:
        chosen["hw_decoder_load"] = job.load
    return config.Data(root=job.shards, jpeg_fancy_upsampling=job.fancy, **chosen)


def endless(job: InputJob, split: Split) -> Plan:
    """The plan of a run that is longer than any measurement."""
    train = config.Train(epochs=1_000_000, global_batch_size=job.batch)
    return schedule.make_plan(train, config.Optim(), split.num_samples, world_size=1)


# --------------------------------------------------------------------------------------------------
# torchvision and webdataset
# --------------------------------------------------------------------------------------------------


def torchvision_v1(job: InputJob) -> Batches:
    """torchvision's ImageFolder and DataLoader, with transforms v1 on PIL images."""
    from torchvision import transforms
    from torchvision.datasets import folder

    from fasttrain.resize import MEAN, STD

    steps = [
        transforms.RandomResizedCrop(job.crop_px),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return image_folder(job, transforms.Compose(steps), folder.default_loader)


def torchvision_v2(job: InputJob) -> Batches:
    """As `torchvision_v1`, but with torchvision's decoder and transforms v2 on tensors."""
    from torchvision.io import ImageReadMode, decode_image

    return image_folder(job, transforms_v2(job), lambda path: decode_image(path, ImageReadMode.RGB))


def image_folder(
    job: InputJob, transform: Callable[..., Any], load: Callable[[str], Any]
) -> Batches:
    """Batches of torchvision's ImageFolder; `load` decodes the file at a path."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    assert job.folder
    dataset = ImageFolder(str(job.folder / "train"), transform, loader=load)
    # Many permutations in a row, because a DataLoader starts its workers again for each epoch.
    sampler = RandomSampler(dataset, num_samples=1000 * max(len(dataset), job.images))
    loader = DataLoader(
        dataset, job.batch, sampler=sampler, num_workers=job.threads, multiprocessing_context="fork"
    )
    yield from loader


def transforms_v2(job: InputJob) -> Callable[..., Any]:
    """Crop, flip and normalise a uint8 tensor."""
    import torch
    from torchvision.transforms import v2

    from fasttrain.resize import MEAN, STD

    steps = [
        v2.RandomResizedCrop(job.crop_px, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose(steps)


def webdataset(job: InputJob) -> Batches:
    """webdataset's loader: shards drawn with replacement, torchvision's decoder, transforms v2."""
    import torch
    import webdataset as wds
    from torchvision.io import ImageReadMode, decode_image

    split = shards.open_split(job.shards, "train")
    transform = transforms_v2(job)

    def decode(stored: bytes) -> Any:
        data = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        if split.store == "jpeg":
            return decode_image(data, ImageReadMode.RGB)
        width, height = (int(word) for word in stored[:32].split(maxsplit=3)[1:3])
        return data[-3 * width * height :].view(height, width, 3).permute(2, 0, 1)

    def load(sample: tuple[bytes, bytes]) -> tuple[Any, int]:
        return transform(decode(sample[0])), int(sample[1])

    dataset = wds.WebDataset(
        [str(path) for path in split.shard_paths], resampled=True, shardshuffle=False
    )
    dataset = dataset.shuffle(1000).to_tuple(images_of(split), "cls").map(load)
    # The DataLoader makes the batches: `.batched` would copy them once more.
    yield from wds.WebLoader(
        dataset, batch_size=job.batch, num_workers=job.threads, multiprocessing_context="fork"
    )


def images_of(split: Split) -> str:
    """The suffixes of a tar's images, in the notation of webdataset and DALI."""
    return "ppm" if split.store == "raw" else "jpg;jpeg;JPEG;png"


# --------------------------------------------------------------------------------------------------
# DALI
# --------------------------------------------------------------------------------------------------


def dali_reader(job: InputJob) -> Batches:
    """DALI's reader of WebDataset tars, with its fused decoder of random crops."""
    from nvidia.dali import fn, types

    from fasttrain.resize import MEAN, STD

    def graph() -> tuple[Any, Any]:
        encoded, text = read_tars(job)
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if job.gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(
            images,
            size=[job.crop_px, job.crop_px],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        return images, text

    import torch

    for images, text in run(job, graph):
        labels = numbers(text).to(job.device)
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), labels


def read_tars(job: InputJob, dont_use_mmap: bool = False) -> tuple[Any, Any]:
    """The outputs of DALI's reader in a graph: encoded images, and labels as text."""
    from nvidia.dali import fn

    split = shards.open_split(job.shards, "train")
    reader: Any = fn.readers.webdataset
    encoded, text = reader(
        paths=[str(path) for path in split.shard_paths],
        index_paths=[str(path.with_suffix(".idx")) for path in split.shard_paths],
        ext=[images_of(split), "cls"],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=SHUFFLED,
        dont_use_mmap=dont_use_mmap,
    )
    return encoded, text


def run(job: InputJob, graph: Callable[[], tuple[Any, Any]]) -> Batches:
    """The outputs of a DALI graph, batch by batch."""
    from nvidia.dali import pipeline_def

    pipeline = pipeline_def(graph)(
        batch_size=job.batch,
        num_threads=job.threads,
        device_id=0 if job.gpu else None,
        prefetch_queue_depth=job.queue_depth,
        seed=0,
    )
    pipeline.build()
    while True:
        yield pipeline.run()


def numbers(text: Any) -> Any:
    """Labels as an int64 tensor of shape (B,), from the text of the .cls members."""
    import torch

    if text.is_dense_tensor():  # as in fasttrain's tars; this takes a tenth of the time
        digits = np.asarray(text.as_array(), np.int64) - ord("0")  # (B, width)
        return torch.from_numpy(digits @ 10 ** np.arange(digits.shape[1])[::-1])
    return torch.tensor([int(bytes(text.at(sample))) for sample in range(len(text))])


# --------------------------------------------------------------------------------------------------
# Decoding alone
# --------------------------------------------------------------------------------------------------


def decode_alone(job: InputJob) -> Batches:
    """Reads and decodes whole images with libjpeg-turbo in threads, and drops the pixels."""
    import torch

    decode = jpeg_decoder()
    split = shards.open_split(job.shards, "train")

    def work(sample: int) -> None:
        path, offset = split.shard_paths[split.shard[sample]], int(split.offset[sample])
        decode(np.fromfile(path, np.uint8, int(split.size[sample]), offset=offset))

    plan = endless(job, split)
    with ThreadPoolExecutor(job.threads) as pool:

        def submit(step: int) -> tuple[Any, Any]:
            ids = sampling.train_draw(split, settings(job), plan, 0, step).ids
            return pool.map(work, ids.tolist()), torch.from_numpy(split.label[ids].astype(np.int64))

        ahead = [submit(0)]
        for step in itertools.count(1):
            ahead.append(submit(step))
            results, labels = ahead.pop(0)
            list(results)
            yield None, labels


def jpeg_decoder() -> Callable[[Any], object]:
    """simplejpeg's decoder of uint8 arrays; torchvision's where simplejpeg is not installed."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        import torch
        from torchvision.io import ImageReadMode, decode_image

        return lambda data: decode_image(torch.from_numpy(data), ImageReadMode.RGB)
    return lambda data: decode_jpeg(data)


# --------------------------------------------------------------------------------------------------
# Reading alone
# --------------------------------------------------------------------------------------------------


def touch(encoded: Any) -> Any:
    """Reads one byte of every cache line, in DALI's threads.

    Every pipeline's bytes are then fetched from memory once, as a decoder would fetch them, and
    pages that are only mapped are loaded. A reduction over all bytes would do the same, but takes
    several times as long as the reading that is measured. On two busy cores of an AMD EPYC, an
    image of 110 KB took 53 us with reductions.max, 16 us with this function, and 12 us without
    (2026-11-24).
    """
    return encoded[::CACHE_LINE]


def read_fasttrain(job: InputJob, **changes: Any) -> Batches:
    """fasttrain's draws and reading; the bytes go to DALI as in a run, and are not decoded."""
    from nvidia.dali import fn, types

    from fasttrain import pipeline
    from fasttrain.feed import Feed
    from fasttrain.order import TrainingOrder
    from fasttrain.reading import ShardReader

    split = shards.open_split(job.shards, "train")
    chosen, plan = settings(job).model_copy(update=changes), endless(job, split)
    order = TrainingOrder(split, chosen, plan, 0)
    feed = Feed(order, order.numbers(1), windows_only=False, make_reader=ShardReader)

    def source(number: int) -> tuple[Any, Any]:
        draw, views = feed(number)
        done = number - chosen.queue_depth - 1  # DALI has finished with this batch
        if done >= 0:
            feed.done(done)
        return pipeline.bytes_of(views), split.label[draw.ids].astype(np.int64)

    def graph() -> tuple[Any, Any]:
        encoded, labels = fn.external_source(
            source,
            num_outputs=2,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT64],
            ndim=[1, 0],
        )
        return touch(encoded), labels

    return run(job, graph)


def read_fasttrain_copied(job: InputJob) -> Batches:
    """As `read_fasttrain`, with `data.read = "pread"`."""
    return read_fasttrain(job, read="pread")


def read_dali(job: InputJob, dont_use_mmap: bool = False) -> Batches:
    """DALI's reader of WebDataset tars, without decoding."""

    def graph() -> tuple[Any, Any]:
        encoded, text = read_tars(job, dont_use_mmap)
        return touch(encoded), text

    return run(job, graph)


def read_dali_copied(job: InputJob) -> Batches:
    """As `read_dali`, with reads instead of mapped files."""
    return read_dali(job, dont_use_mmap=True)


PIPELINES: dict[str, Callable[[InputJob], Batches]] = {
    "fasttrain": fasttrain,
    "torchvision v1": torchvision_v1,
    "torchvision v2": torchvision_v2,
    "webdataset": webdataset,
    "DALI reader": dali_reader,
    "decode alone": decode_alone,
}
READERS: dict[str, Callable[[InputJob], Batches]] = {
    "fasttrain": read_fasttrain,
    "fasttrain pread": read_fasttrain_copied,
    "DALI reader": read_dali,
    "DALI reader dont_use_mmap": read_dali_copied,
}

"""Making batches to train on.

fasttrain is compared with torchvision's ImageFolder (--folder, the images that the shards were made
from), webdataset, DALI's own reader, and decoding alone with libjpeg-turbo. Each pipeline is
measured in a new process; its memory is that of the process and its workers. `foreign_cpu` is the
share of the machine's CPUs that other programs took meanwhile. --threads, --batch and --queue-depth
may be lists, such as 1,2,4.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import mmap
import os
import resource
import statistics
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks import own_process, pipelines
from benchmarks.options import NOT_INSTALLED, choose_device, counts
from benchmarks.output import machine, medians, paired_ratio, write
from benchmarks.own_process import Result
from benchmarks.pipelines import Batches, InputJob
from fasttrain import config, shards
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError
from fasttrain.shards import Split

DISTURBED = 0.1  # share of the CPUs taken by other programs
WARM_UP = 4  # batches
FIGURES = ("images_per_s", "cpu_ms_per_image", "first_batch_s", "peak_rss_gib", "peak_pss_gib")


class Stored(NamedTuple):
    """The size of a data set on disk."""

    files: list[Path]
    bytes_per_image: int
    mean_pixels: int  # of an image


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Declares the options of `benchmark.py input`."""
    cpus = str(len(os.sched_getaffinity(0)))
    part.add_argument("shards", type=Path, metavar="SHARDS", help="folder of the shards")
    part.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="the ImageFolder that the shards were made from; torchvision reads it",
    )
    lists = (
        (
            "--threads",
            cpus,
            "workers of each pipeline (default: one for each CPU here, %(default)s)",
        ),
        ("--batch", "256", "images in a batch (default: %(default)s)"),
        ("--queue-depth", "2", "batches that fasttrain keeps ready (default: %(default)s)"),
    )
    for name, default, text in lists:
        part.add_argument(name, type=counts, default=default, metavar="N,...", help=text)
    numbers: tuple[tuple[str, int | None, str], ...] = (
        ("--crop-px", 224, "side of the crops, in pixels (default: %(default)s)"),
        (
            "--images",
            None,
            "images to time, at least 4 batches per thread (default: 4096; --raw: 65536)",
        ),
        ("--repeats", 3, "turns (default: %(default)s)"),
    )
    for name, number, text in numbers:
        part.add_argument(name, type=positive, default=number, metavar="N", help=text)
    part.add_argument("--raw", action="store_true", help="only read, do not decode")
    part.add_argument(
        "--cold", action="store_true", help="read from storage, not from the page cache"
    )
    part.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="where images are decoded; gpu: fasttrain in every way, and DALI's reader",
    )


def check(arguments: argparse.Namespace, split: Split) -> None:
    """Refuses wrong options before anything is measured.

    Raises:
        ConfigError: an option does not fit the data, the machine or another option.
    """
    largest, train_set = max(arguments.batch), f"the {split.num_samples:,} training images"
    if largest > split.num_samples:
        raise ConfigError(f"--batch {largest}: more than {train_set}; lower it")
    if arguments.folder and (arguments.raw or arguments.device == "gpu"):
        raise ConfigError(
            "--folder: only torchvision reads it, which takes no part in --raw and --device gpu; "
            "leave out one of them"
        )
    if arguments.raw and arguments.device == "gpu":
        raise ConfigError("--raw: the CPU does the reading; leave out --device gpu")
    choose_device(arguments.device)
    for job in all_jobs(arguments) if arguments.cold else ():
        needed = job.batch * sum(num_batches(job)) + pipelines.SHUFFLED
        if needed > split.num_samples:
            raise ConfigError(
                f"--cold: {job.threads} threads with batches of {job.batch} need {needed:,} "
                f"images, warm-up and shuffling included. That is more than {train_set}, so some "
                "would come from the page cache; lower --images, --batch or --threads"
            )


# --------------------------------------------------------------------------------------------------
# The process that compares
# --------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    """Measures every pipeline in turns and prints a line for each.

    Raises:
        ConfigError: wrong options.
        SystemExit: a pipeline failed; its line has the error.
    """
    split = shards.open_split(arguments.shards, "train")
    check(arguments, split)
    stored = {"shards": stored_shards(split)}
    if arguments.folder:
        stored["folder"] = stored_folder(arguments.folder, split)
    write(machine())
    jobs = jobs_that_can_run(arguments, split)
    if not arguments.cold:
        for path in itertools.chain.from_iterable(data.files for data in stored.values()):
            path.read_bytes()  # loads it into the page cache

    def drop(job: InputJob) -> Result:
        return drop_from_cache(data_of(job, stored).files) if arguments.cold else {}

    turns = own_process.take_turns(jobs, "input", arguments.repeats, drop)
    for job in jobs:
        line = line_of(job, turns[job]) | {
            "bytes_per_image": data_of(job, stored).bytes_per_image,
            "mean_pixels": data_of(job, stored).mean_pixels,
        }
        ratios = ratios_of(job, turns) if job.name == "fasttrain" else {}
        write(line | ({"speed_over": ratios} if ratios else {}))
    report_totals([turn for job in jobs for turn in turns[job]])


def jobs_that_can_run(arguments: argparse.Namespace, split: Split) -> list[InputJob]:
    """The jobs of all pipelines that can take part; prints a line for each that cannot."""
    jobs, skipped = [], {}
    for job in all_jobs(arguments):
        if reason := why_not(job, split):
            skipped[job.name] = reason
        else:
            jobs.append(job)
    for name, reason in skipped.items():
        write({"name": name, "skipped": reason})
    return jobs


def all_jobs(arguments: argparse.Namespace) -> Iterator[InputJob]:
    """fasttrain with every combination of settings, other pipelines once per threads and batch."""
    strategies = ["auto"]
    names = [*(pipelines.READERS if arguments.raw else pipelines.PIPELINES)]
    if arguments.device == "gpu":
        names = ["fasttrain", "DALI reader"]  # the others have no such decoder
        known = typing.get_args(config.Data.model_fields["decode"].annotation)
        strategies = [name for name in known if name != "auto"]
    for threads, batch, name in itertools.product(arguments.threads, arguments.batch, names):
        job = InputJob(
            name=name,
            shards=arguments.shards,
            folder=arguments.folder,
            threads=threads,
            batch=batch,
            crop_px=arguments.crop_px,
            images=arguments.images or (65_536 if arguments.raw else 4096),
            raw=arguments.raw,
            device="cuda:0" if arguments.device == "gpu" else "cpu",
        )
        if name == "fasttrain":
            for depth, decode in itertools.product(arguments.queue_depth, strategies):
                yield job.model_copy(update={"queue_depth": depth, "decode": decode})
        else:
            yield job


def why_not(job: InputJob, split: Split) -> str | None:
    """Why a pipeline cannot take part; None if it can."""
    if job.name.startswith("torchvision") and not job.folder:
        return "it reads an ImageFolder; name one with --folder"
    if job.name == "decode alone" and split.store == "raw":
        return "raw shards need no decoding"
    if job.name == "webdataset" and not importlib.util.find_spec("webdataset"):
        return NOT_INSTALLED
    return None


def line_of(job: InputJob, turns: Sequence[Result]) -> Result:
    """The JSON line of a pipeline: its settings, the medians of its turns, and its failures."""
    fields = {"threads", "batch", "crop_px", "device"}
    if job.name == "fasttrain":
        fields |= {"queue_depth", "decode"}
    line: Result = {"name": job.name, **job.model_dump(include=fields)}
    failures = [turn for turn in turns if "failed" in turn]
    if failures:
        line["failed"] = failures
    good = [turn for turn in turns if "failed" not in turn]
    if good:
        line["images"] = good[0]["images"]
        line |= medians(good, (*FIGURES, *(["loader_us_per_image"] if job.raw else [])))
        seconds = sorted(turn["seconds"] for turn in good)
        middle = statistics.median(seconds)
        line["seconds"] = [round(value, 2) for value in (seconds[0], middle, seconds[-1])]
        line["foreign_cpu"] = [round(turn["foreign_cpu"], 3) for turn in good]
        line["disturbed"] = sum(turn["foreign_cpu"] > DISTURBED for turn in good)
        if "cached" in good[0]:
            line["cached"] = max(turn["cached"] for turn in good)
    return line


def ratios_of(job: InputJob, turns: dict[InputJob, list[Result]]) -> dict[str, float]:
    """fasttrain's speed over each other pipeline's with the same threads and batch."""
    ratios = {}
    for other in turns:
        if other.name == job.name or (other.threads, other.batch) != (job.threads, job.batch):
            continue
        pairs = [
            (ours["images_per_s"], theirs["images_per_s"])
            for ours, theirs in zip(turns[job], turns[other], strict=True)
            if "failed" not in ours and "failed" not in theirs
        ]
        if pairs:
            ratios[other.name] = paired_ratio(*zip(*pairs, strict=True))
    return ratios


def report_totals(turns: Sequence[Result]) -> None:
    """Prints how many measurements there were, failed, and were disturbed by other programs.

    Raises:
        SystemExit: one failed.
    """
    failed = sum("failed" in turn for turn in turns)
    disturbed = sum(turn.get("foreign_cpu", 0) > DISTURBED for turn in turns)
    counted = {"measurements": len(turns), "failed": failed}
    write(counted | {"disturbed": disturbed, "foreign_cpu_above": DISTURBED})
    if failed:
        raise SystemExit(1)


# --------------------------------------------------------------------------------------------------
# The data on disk and in the page cache
# --------------------------------------------------------------------------------------------------


def data_of(job: InputJob, stored: dict[str, Stored]) -> Stored:
    """The data that a pipeline reads."""
    return stored["folder" if job.name.startswith("torchvision") else "shards"]


def stored_shards(split: Split) -> Stored:
    """The size of the shards' training images."""
    pixels = np.multiply(split.width, split.height, dtype=np.int64).mean()
    num_bytes = sum(split.shard_bytes)
    return Stored(list(split.shard_paths), num_bytes // split.num_samples, round(pixels))


def stored_folder(folder: Path, split: Split) -> Stored:
    """The size of an ImageFolder's training images.

    Raises:
        ConfigError: they are not the images that the shards were made from.
    """
    from PIL import Image

    root = folder / "train"
    files = sorted(path for path in root.glob("*/*") if path.is_file())
    if not files:
        raise ConfigError(
            f"--folder {folder}: no images in {root}/<class>/; name the ImageFolder that the "
            "shards were made from"
        )
    manifest = shards.read_manifest(split.root)["splits"]["train"]
    if len(files) != split.num_samples + len(manifest["rejected"]):
        raise ConfigError(
            f"--folder {folder}: it has {len(files):,} training images, but the shards have "
            f"{split.num_samples:,}; name the ImageFolder that the shards were made from"
        )
    pixels = []
    for path in files[:: -(-len(files) // 5000)]:  # enough for a mean
        with Image.open(path) as image:
            pixels.append(image.width * image.height)
    num_bytes = sum(path.stat().st_size for path in files)
    return Stored(files, num_bytes // len(files), round(statistics.mean(pixels)))


def drop_from_cache(files: Sequence[Path]) -> dict[str, float]:
    """Drops files from the page cache; returns the share of their bytes that is still in it."""
    os.sync()  # what is not yet on the disk cannot be dropped
    kept = total = 0
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kept += num_cached(path)
        total += path.stat().st_size
    share = round(kept / total, 4)
    if share:
        sys.stderr.write(f"{share:.2%} of the files could not be dropped from the page cache\n")
    return {"cached": share}


def num_cached(path: Path) -> int:
    """Bytes of a file in the page cache. The kernel reports another user's file as all cached."""
    data = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if mincore(data.ctypes.data, len(data), pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return min(len(data), int((pages & 1).sum()) * mmap.PAGESIZE)


# --------------------------------------------------------------------------------------------------
# The process that is measured
# --------------------------------------------------------------------------------------------------


def measure(job: InputJob) -> Result:
    """Speed and CPU time of some batches, after the first ones.

    Raises:
        AssertionError: a batch has another shape, dtype or device than the job asks for.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # ImageNet has over 1,000 tars
    import torch  # noqa: F401  (its import is not part of the time to the first batch)

    beside_before = beside_torch(job)
    start = time.perf_counter()
    batches = job.batches()
    first = next(batches)
    synchronize(job)
    first_batch_s = time.perf_counter() - start
    check_batch(job, first)
    del first  # loaders reuse the memory of batches that are no longer held
    warm_up, timed = num_batches(job)
    take(batches, warm_up - 1, job)
    before = spent()
    take(batches, timed, job)
    after = spent()
    beside = beside_torch(job) - beside_before
    batches.close()
    seconds, own, thread, foreign = (
        late - early for early, late in zip(before, after, strict=True)
    )
    num_images = timed * job.batch
    return {
        "images": num_images,
        "seconds": seconds,
        "images_per_s": num_images / seconds,
        "cpu_ms_per_image": 1e3 * own / num_images,
        "first_batch_s": first_batch_s,
        "loader_us_per_image": 1e6 * thread / num_images,
        "cores_busy": own / seconds,
        "foreign_cpu": max(0.0, foreign) / (seconds * (os.cpu_count() or 1)),
        **({"gpu_beside_gib": beside / 2**30, "raw_by": raw_by(job)} if job.gpu else {}),
    }


def check_batch(job: InputJob, batch: tuple[Any, Any]) -> None:
    """Asserts that a batch has the shapes, dtypes and device that the job asks for."""
    import torch

    images, labels = batch
    if job.raw or images is None:
        return
    shape = (job.batch, 3, job.crop_px, job.crop_px)
    dtype = torch.float16 if job.half else torch.float32
    assert images.shape == shape and images.dtype == dtype, (images.shape, images.dtype)
    assert labels.shape == shape[:1] and labels.dtype == torch.int64, labels.dtype
    assert images.device == labels.device == torch.device(job.device)


def take(batches: Batches, number: int, job: InputJob) -> None:
    """Takes batches without keeping them, and waits for the last one."""
    for _ in range(number):
        next(batches)
    synchronize(job)


def num_batches(job: InputJob) -> tuple[int, int]:
    """How many batches warm up, and how many are timed.

    Each worker of a DataLoader makes a whole batch, so batches come `threads` at a time. With only
    a few such waves, batches that were made before the start would count.
    """
    return max(WARM_UP, job.threads), max(-(-job.images // job.batch), 4 * job.threads)


def synchronize(job: InputJob) -> None:
    """Waits for the GPU: its batches are handed over before they are finished."""
    if job.gpu:
        import torch

        torch.cuda.synchronize()


def raw_by(job: InputJob) -> str | None:
    """What makes batches of raw images on a GPU: fasttrain's kernel, or DALI."""
    if job.name != "fasttrain" or shards.open_split(job.shards, "train").store != "raw":
        return None
    import torch

    from fasttrain import makers
    from fasttrain.batch import Placement

    placement = Placement(torch.device(job.device), half=job.half, threads=job.threads)
    by_kernel = makers.kernel_works(pipelines.settings(job), placement, training=True)
    return "kernel" if by_kernel else "DALI"


def beside_torch(job: InputJob) -> int:
    """Bytes of the GPU's memory that are in use, without those of torch's allocator."""
    if not job.gpu:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def spent() -> tuple[float, float, float, float]:
    """Seconds since some moment: of the clock; and CPU time of three kinds.

    The kinds are: this process and its children; this thread; and other programs, which is the rest
    of the machine without this process's parent, because the parent watches us.
    """
    cpu = psutil.cpu_times()
    busy = sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice
    own = time.process_time()  # finer than the kernel's ticks
    for process in own_process.family(os.getpid())[1:]:
        with contextlib.suppress(psutil.Error):
            own += sum(process.cpu_times()[:2])
    parent = sum(psutil.Process(os.getppid()).cpu_times()[:2])
    return time.perf_counter(), own, time.thread_time(), busy - own - parent

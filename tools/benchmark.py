"""Measures fasttrain beside what else there is, on one machine, in one run.

    python tools/benchmark.py shards SOURCE [--repeats 5]
    python tools/benchmark.py input SHARDS [--folder IMAGEFOLDER] [--repeats 3]
    python tools/benchmark.py step [--arch large] [--batch 256,1024] [--profile]
    python tools/benchmark.py loop [--arch large]
    python tools/benchmark.py scaling [--arch large] [--step-ms 1024:60,128:9]
    python tools/benchmark.py record --out DIR [--minutes 10] [--data SHARDS ...] [--stages step]

shards: making shards of an ImageFolder, without and with decoding every image, beside copying the
files (cp -r --reflink=never), webdataset.ShardWriter, and decoding alone with libjpeg-turbo by way
of Pillow. SOURCE is read once beforehand, so that all find it in the page cache.

input: making batches to train on, beside torchvision's ImageFolder (of --folder, which the shards
were made of), webdataset, DALI's own reader, and decoding alone with libjpeg-turbo. Each is
measured in a fresh process; memory is that of it and its workers, foreign_cpu the share of the
machine's CPUs that others took meanwhile. --threads, --batch and --queue-depth may be lists: 1,2,4.

step: updates on a batch that stays on the device, everything of the loop but the input, beside a
plain eager loop on the same network, and the networks of torchvision and timm, each in every layout
and, compiled or not, every mode; the best of each counts. --profile: where the time goes. On a GPU
all is channels-last, without the plain loop, and what compiles does so first, several at a time.

loop: the loop itself on a batch that stays on the device, beside the bare updates.

scaling: predicts updates, epochs and the whole run on 1 to 512 devices, and what limits each, from
the updates and links measured here, or given. The lr of a larger batch is that of the linear rule.

record: all of this that the machine can tell, most important first, within --minutes: the machine,
the GPU's tests, updates, kernels, input, loop, train.py, Imagenette. It writes DIR/record.jsonl as
it goes and DIR/record.md for RECORDS.md, and goes on with what is there: --stages, --arch, --batch
and --modes choose a part, other calls the rest. What fails is recorded and does not end it.

The contestants take turns. Each prints one JSON line with the median and spread of its repeats, and
its ratio to the reference that it is held against. A table for people follows on standard error.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import rivals
import summary
from apart import LIMIT_S, family, measure_apart, warm
from rivals import Job

from fasttrain import config, sharding, shards, sources
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError, Fault, stop
from fasttrain.listing import Source
from fasttrain.sharding import Policy
from fasttrain.shards import Split

if typing.TYPE_CHECKING:
    import steps


class Contestant(NamedTuple):
    """What is measured, and against whom its speed is held."""

    name: str
    run: Callable[[], object]
    reference: str | None = None


def measure(
    contestants: Sequence[Contestant], repeats: int, clean_up: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every repeat of every contestant, taken in turns, without the cleaning up."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for repeat in range(repeats):
        for contestant in contestants:
            start = time.perf_counter()
            contestant.run()
            seconds[contestant.name].append(time.perf_counter() - start)
            clean_up()
            sys.stderr.write(f"{repeat + 1}/{repeats} {contestant.name}\n")
    return seconds


def report(
    contestants: Sequence[Contestant], seconds: dict[str, list[float]], images: int, num_bytes: int
) -> None:
    """Prints a JSON line for each contestant.

    The ratio is the median of the paired ratios of each turn, so that a machine that slows down in
    between slows both.
    """
    for name, _, reference in contestants:
        own = seconds[name]
        middle = statistics.median(own)
        line: dict[str, Any] = {
            "name": name,
            "images_per_s": round(images / middle),
            "mb_per_s": round(num_bytes / 1e6 / middle, 1),
            "seconds": [round(value, 2) for value in (min(own), middle, max(own))],
        }
        if reference:
            pairs = [theirs / ours for ours, theirs in zip(own, seconds[reference], strict=True)]
            line["speed_over"] = {reference: round(statistics.median(pairs), 3)}
        write(line)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from fasttrain import runtime  # and so torch, once the arguments are known to be right

    packages = ("torch", "torchvision", "webdataset", "simplejpeg", "pillow", "numpy", "psutil")
    versions = {
        distribution.name: distribution.version
        for distribution in metadata.distributions()
        if distribution.name.startswith("nvidia-dali-cuda") or distribution.name in packages
    }
    return {
        "cpu": runtime.cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **dict(sorted(versions.items())),
        "commit": runtime.commit(),
    }


# --------------------------------------------------------------------------------------------------
# shards
# --------------------------------------------------------------------------------------------------


NOT_INSTALLED = "not installed: pip install -e '.[bench]'"


def benchmark_shards(root: Path, repeats: int, scratch: Path | None) -> None:
    files = [path for path in root.rglob("*") if path.is_file()]
    num_bytes = sum(len(path.read_bytes()) for path in files)  # and so into the page cache
    cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "out"

        def listed() -> Source:
            return sources.scan(root, "imagefolder", out, list, lambda text: None)

        def ours(decode: bool) -> None:
            out.mkdir()
            sharding.write_dataset(listed(), out, Policy(decode=decode), workers=cpus)

        def copy() -> None:
            subprocess.run(["cp", "-r", "--reflink=never", root, out], check=True)

        def webdataset() -> None:
            shard_writer(listed(), out)

        known = importlib.util.find_spec("webdataset")
        if not known:
            write({"name": "webdataset.ShardWriter", "skipped": NOT_INSTALLED})
        contestants = [
            Contestant("cp -r", copy),
            Contestant("decode alone", lambda: decode_all(files, cpus)),
            *([Contestant("webdataset.ShardWriter", webdataset, "cp -r")] if known else []),
            Contestant("fasttrain --skip-decoding", lambda: ours(False), "cp -r"),
            Contestant("fasttrain", lambda: ours(True), "decode alone"),
        ]
        clean_up = partial(shutil.rmtree, out, ignore_errors=True)
        seconds = measure(contestants, repeats, clean_up)
    report(contestants, seconds, len(files), num_bytes)


def shard_writer(source: Source, out: Path) -> None:
    """The same images by webdataset's own writer, in one process, in the order of their names."""
    from webdataset import ShardWriter

    out.mkdir()
    for split, listing in source.splits.items():
        with ShardWriter(f"{out}/{split}-%06d.tar", maxcount=1000, verbose=0) as writer:
            for number, (_, label, data) in enumerate(sharding.read_images(listing)):
                writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": label})


def decode_all(files: Sequence[Path], workers: int) -> None:
    """Decodes every file with libjpeg-turbo, in as many processes as there are CPUs."""
    parts = [files[start::workers] for start in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode_some, parts))


def decode_some(files: Sequence[Path]) -> None:
    from PIL import Image

    for path in files:
        with Image.open(path) as image:
            image.load()


# --------------------------------------------------------------------------------------------------
# input: the parent
# --------------------------------------------------------------------------------------------------

DISTURBED = 0.1  # of the CPUs taken by others
WARM_UP = 4  # batches
FIGURES = ("images_per_s", "cpu_ms_per_image", "first_batch_s", "peak_rss_gib", "peak_pss_gib")


class Stored(NamedTuple):
    """A data set as it lies on disk."""

    files: list[Path]
    bytes_per_image: int
    mean_pixels: int


def benchmark_input(arguments: argparse.Namespace) -> None:
    split = shards.open_split(arguments.shards, "train")
    check_input(arguments, split)
    stored = {"shards": stored_shards(split)}
    if arguments.folder:
        stored["folder"] = stored_folder(arguments.folder, split)
    write(machine())
    jobs, skipped = [], {}
    for job in all_jobs(arguments):
        if reason := why_not(job, split):
            skipped[job.name] = reason
        else:
            jobs.append(job)
    for name, reason in skipped.items():
        write({"name": name, "skipped": reason})
    if not arguments.cold:
        for path in itertools.chain.from_iterable(data.files for data in stored.values()):
            path.read_bytes()  # and so into the page cache
    turns: dict[Job, list[dict[str, Any]]] = {job: [] for job in jobs}
    for repeat, job in itertools.product(range(arguments.repeats), jobs):
        cached = drop_from_cache(data_of(job, stored).files) if arguments.cold else {}
        turns[job].append(measure_apart(job) | cached)
        sys.stderr.write(f"{repeat + 1}/{arguments.repeats} {job.name}\n")
    for job in jobs:
        report_input(job, data_of(job, stored), turns)
    done = [turn for job in jobs for turn in turns[job]]
    failed = sum("failed" in turn for turn in done)
    disturbed = sum(turn.get("foreign_cpu", 0) > DISTURBED for turn in done)
    counted = {"measurements": len(done), "failed": failed}
    write(counted | {"disturbed": disturbed, "foreign_cpu_above": DISTURBED})
    if failed:
        raise SystemExit(1)


def check_input(arguments: argparse.Namespace, split: Split) -> None:
    """Raises what is wrong with the options, before anything is measured."""
    largest, train_set = max(arguments.batch), f"the {split.num_samples:,} training images"
    if largest > split.num_samples:
        raise ConfigError(f"--batch {largest}: more than {train_set}; lower it")
    if arguments.folder and (arguments.raw or arguments.device == "gpu"):
        raise ConfigError(
            "--folder: its images are read by torchvision, which has no part in --raw and "
            "--device gpu; leave out the one or the other"
        )
    if arguments.raw and arguments.device == "gpu":
        raise ConfigError("--raw: reading is done on the CPU; leave out --device gpu")
    if arguments.device == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device gpu: torch finds no GPU here; leave it out")
    for job in all_jobs(arguments) if arguments.cold else ():
        needed = job.batch * sum(num_batches(job)) + rivals.SHUFFLED
        if needed > split.num_samples:
            raise ConfigError(
                f"--cold: {needed:,} images at {job.threads} threads and batches of {job.batch}, "
                f"with those to warm up and shuffle, are more than {train_set}, and the rest would "
                "come from the page cache; lower --images, --batch or --threads"
            )


def stored_shards(split: Split) -> Stored:
    pixels = np.multiply(split.width, split.height, dtype=np.int64).mean()
    num_bytes = sum(split.shard_bytes)
    return Stored(list(split.shard_paths), num_bytes // split.num_samples, round(pixels))


def stored_folder(folder: Path, split: Split) -> Stored:
    """The training images of an ImageFolder, which must be those of the shards."""
    from PIL import Image

    root = folder / "train"
    files = sorted(path for path in root.glob("*/*") if path.is_file())
    if not files:
        raise ConfigError(
            f"--folder {folder}: no images in {root}/<class>/; name the ImageFolder that the "
            "shards were made of"
        )
    manifest = shards.read_manifest(split.root)["splits"]["train"]
    if len(files) != split.num_samples + len(manifest["rejected"]):
        raise ConfigError(
            f"--folder {folder}: {len(files):,} training images, {split.num_samples:,} in the "
            "shards; name the ImageFolder that the shards were made of"
        )
    pixels = []
    for path in files[:: -(-len(files) // 5000)]:  # enough for a mean
        with Image.open(path) as image:
            pixels.append(image.width * image.height)
    num_bytes = sum(path.stat().st_size for path in files)
    return Stored(files, num_bytes // len(files), round(statistics.mean(pixels)))


def data_of(job: Job, stored: dict[str, Stored]) -> Stored:
    return stored["folder" if job.name.startswith("torchvision") else "shards"]


def all_jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """fasttrain in every combination of the settings, its rivals once per threads and batch."""
    strategies = ["auto"]
    names = [*(rivals.READERS if arguments.raw else rivals.PIPELINES)]
    if arguments.device == "gpu":
        names = ["fasttrain", "DALI reader"]  # the others have no such decoder
        known = typing.get_args(config.Data.model_fields["decode"].annotation)
        strategies = [name for name in known if name != "auto"]
    for threads, batch in itertools.product(arguments.threads, arguments.batch):
        for name in names:
            job = Job(
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


def why_not(job: Job, split: Split) -> str | None:
    """Why a contestant cannot take part."""
    if job.name.startswith("torchvision") and not job.folder:
        return "reads an ImageFolder: name one with --folder"
    if job.name == "decode alone" and split.store == "raw":
        return "nothing is left to decode in raw shards"
    if job.name == "webdataset" and not importlib.util.find_spec("webdataset"):
        return NOT_INSTALLED
    return None


def report_input(job: Job, stored: Stored, turns: dict[Job, list[dict[str, Any]]]) -> None:
    """Prints the JSON line of a contestant: medians of its turns.

    fasttrain's has its speed over each rival, as the median of the paired ratios of the turns.
    """
    fields = {"threads", "batch", "crop_px", "device"}
    if job.name == "fasttrain":
        fields |= {"queue_depth", "decode"}
    line = {"name": job.name, **job.model_dump(include=fields)}
    failures = [turn for turn in turns[job] if "failed" in turn]
    if failures:
        line["failed"] = failures
    good = [turn for turn in turns[job] if "failed" not in turn]
    if good:
        line["images"] = good[0]["images"]
        for key in (*FIGURES, *(["loader_us_per_image"] if job.raw else [])):
            values = [turn[key] for turn in good if turn[key] is not None]
            line[key] = float(f"{statistics.median(values):.4g}") if values else None
        seconds = sorted(turn["seconds"] for turn in good)
        middle = statistics.median(seconds)
        line["seconds"] = [round(value, 2) for value in (seconds[0], middle, seconds[-1])]
        line["foreign_cpu"] = [round(turn["foreign_cpu"], 3) for turn in good]
        line["disturbed"] = sum(turn["foreign_cpu"] > DISTURBED for turn in good)
        if "cached" in good[0]:
            line["cached"] = max(turn["cached"] for turn in good)
    line |= {"bytes_per_image": stored.bytes_per_image, "mean_pixels": stored.mean_pixels}
    ratios = {}
    for other in turns if job.name == "fasttrain" else ():
        if other.name != job.name and (other.threads, other.batch) == (job.threads, job.batch):
            pairs = [
                ours["images_per_s"] / theirs["images_per_s"]
                for ours, theirs in zip(turns[job], turns[other], strict=True)
                if "failed" not in ours and "failed" not in theirs
            ]
            if pairs:
                ratios[other.name] = round(statistics.median(pairs), 3)
    if ratios:
        line["speed_over"] = ratios
    write(line)


written: list[dict[str, Any]] = []  # what this process has printed


def write(line: dict[str, Any]) -> None:
    written.append(line)
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def drop_from_cache(files: Sequence[Path]) -> dict[str, float]:
    """Drops files from the page cache, and says which share of them is in it still."""
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
    """Bytes of a file in the page cache; for files of others the kernel says that all are."""
    data = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if mincore(data.ctypes.data, len(data), pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return min(len(data), int((pages & 1).sum()) * mmap.PAGESIZE)


# --------------------------------------------------------------------------------------------------
# input: the process that is measured
# --------------------------------------------------------------------------------------------------


def measure_input(job: Job) -> dict[str, Any]:
    """Seconds and CPU time of some batches, once the first ones are through."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for ImageNet has over 1,000 tars
    import torch

    beside_before = beside_torch(job)
    start = time.perf_counter()
    batches = job.batches()
    images, labels = next(batches)
    wait_for(job)
    first_batch_s = time.perf_counter() - start
    if not job.raw and images is not None:
        shape = (job.batch, 3, job.crop_px, job.crop_px)
        dtype = torch.float16 if job.half else torch.float32
        assert images.shape == shape and images.dtype == dtype, (images.shape, images.dtype)
        assert labels.shape == shape[:1] and labels.dtype == torch.int64, labels.dtype
        assert images.device == labels.device == torch.device(job.device)
    del images, labels  # or their memory would be missing from what is filled in turn
    warm_up, timed = num_batches(job)
    for _ in range(warm_up - 1):
        next(batches)
    wait_for(job)
    before = spent()
    for _ in range(timed):
        next(batches)
    wait_for(job)
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


def num_batches(job: Job) -> tuple[int, int]:
    """How many batches warm up, and how many are timed.

    Each worker of a DataLoader makes a whole batch, so they come `threads` at a time: with fewer
    than some such waves, what was made before the start would count.
    """
    return max(WARM_UP, job.threads), max(-(-job.images // job.batch), 4 * job.threads)


def wait_for(job: Job) -> None:
    """Batches on a GPU are handed over before they are done."""
    if job.gpu:
        import torch

        torch.cuda.synchronize()


def raw_by(job: Job) -> str | None:
    """What makes batches of raw images on a GPU: the project's kernel, or DALI."""
    if job.name != "fasttrain" or shards.open_split(job.shards, "train").store != "raw":
        return None
    import torch

    from fasttrain import makers
    from fasttrain.batch import Placement

    place = Placement(torch.device(job.device), half=job.half, threads=job.threads)
    return "kernel" if makers.kernel_works(rivals.settings(job), place, training=True) else "DALI"


def beside_torch(job: Job) -> int:
    """Bytes of the GPU that are taken by others than torch's allocator."""
    if not job.gpu:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def spent() -> tuple[float, float, float, float]:
    """Seconds: of the clock; of CPU in this process and its children, in this thread, in others.

    "Others" is what the machine, and whoever else runs on its host, took beyond ourselves and the
    parent, which watches us.
    """
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
    own = time.process_time()  # finer than the kernel's ticks
    for process in family(os.getpid())[1:]:
        with contextlib.suppress(psutil.Error):
            own += sum(process.cpu_times()[:2])
    parent = sum(psutil.Process(os.getppid()).cpu_times()[:2])
    return time.perf_counter(), own, time.thread_time(), busy - own - parent


# --------------------------------------------------------------------------------------------------
# step and loop
# --------------------------------------------------------------------------------------------------

STEP_FIGURES = ("images_per_s", "step_ms", "first_step_s", "peak_gib", "first_loss", "loss")
CPUS_TO_COMPILE = 3  # of each process that compiles: one traces, others make kernels


def benchmark_step(arguments: argparse.Namespace) -> None:
    write(machine())
    jobs = list(step_jobs(arguments))
    turns: dict[Any, list[dict[str, Any]]] = {job: [] for job in jobs}
    if arguments.device == "gpu":
        warm_all([job for job in jobs if job.compiles], LIMIT_S)
    for repeat, job in itertools.product(range(arguments.repeats), jobs):
        turns[job].append(measure_apart(job, "step"))
        sys.stderr.write(f"{repeat + 1}/{arguments.repeats} {job.name} {job.execution}\n")
    for job in jobs:
        line = job.model_dump(exclude={"seconds", "profile"})
        good = [turn for turn in turns[job] if "failed" not in turn]
        if len(good) < len(turns[job]):
            line["failed"] = [turn for turn in turns[job] if "failed" in turn]
        for key in STEP_FIGURES:
            values = [turn[key] for turn in good if key in turn]
            if values:
                line[key] = float(f"{statistics.median(values):.4g}")
        write(line)
        for row in good[-1].get("profile", ()) if good else ():
            write({"profile": job.name, **row})
    for setting in dict.fromkeys(setting_of(job) for job in jobs):
        write_step_ratios([job for job in jobs if setting_of(job) == setting], turns)
    if any("failed" in turn and job.execution == "eager" for job in jobs for turn in turns[job]):
        raise SystemExit(1)


def warm_all(jobs: "Sequence[steps.StepJob]", limit_s: float) -> list[dict[str, Any]]:
    """Compiles for all the jobs, as many at a time as CPUs and the memory of the GPU allow."""
    import steps

    if not jobs:
        return []
    slots = max(1, len(os.sched_getaffinity(0)) // CPUS_TO_COMPILE)
    if jobs[0].gpu:
        slots = min(slots, steps.gpu_bytes() // max(map(steps.bytes_held, jobs)))
    slots = max(1, min(slots, len(jobs)))
    return warm(jobs, slots, limit_s, lambda text: sys.stderr.write(f"{text}\n"))


def step_jobs(arguments: argparse.Namespace) -> Iterator["steps.StepJob"]:
    """Everybody in every way of carrying out a step, for each batch and precision."""
    import steps

    device = "cuda" if arguments.device == "gpu" else "cpu"
    rivals_modes = [mode for mode in arguments.modes if "graph" not in mode]
    names: list[Any] = ["fasttrain"]
    if arguments.deterministic:
        names += ["fasttrain deterministic"]
    if arguments.part == "loop":
        names += ["fasttrain loop"]
    if arguments.part == "step":
        # On a GPU, contiguous images are far slower and the plain loop is that of torchvision.
        names += ["torchvision"] if device == "cuda" else ["plain loop", "torchvision"]
        if importlib.util.find_spec("timm"):
            names += ["timm"]
        else:
            write({"name": "timm", "skipped": NOT_INSTALLED})
    for batch, precision, name in itertools.product(arguments.batch, arguments.precision, names):
        ours = name.startswith("fasttrain")
        modes = arguments.modes if ours else rivals_modes
        if name in ("fasttrain deterministic", "plain loop"):
            modes = ["eager"]
        both = name in ("torchvision", "timm") and device == "cpu"
        layouts: list[Any] = ["channels_last", "contiguous"] if both else ["channels_last"]
        for mode, layout in itertools.product(modes, layouts):
            if "graph" in mode and precision == "fp16":
                continue
            yield steps.StepJob(
                name=name,
                arch=arguments.arch,
                width=arguments.width,
                batch=batch,
                px=arguments.crop_px,
                precision=precision,
                execution=mode,
                layout="contiguous" if name == "plain loop" else layout,
                device=device,
                threads=arguments.threads,
                seconds=arguments.seconds,
                profile=arguments.profile and name == "fasttrain",
            )


def setting_of(job: "steps.StepJob") -> tuple[Any, ...]:
    return job.batch, job.precision


def write_step_ratios(jobs: "list[steps.StepJob]", turns: dict[Any, list[dict[str, Any]]]) -> None:
    """The best of fasttrain over the best of each other: medians of the ratios of the turns."""
    best = {}
    for name in dict.fromkeys(job.name for job in jobs):
        done = [j for j in jobs if j.name == name and not any("failed" in t for t in turns[j])]
        if done:
            speed = lambda job: statistics.median(t["images_per_s"] for t in turns[job])  # noqa: E731
            best[name] = max(done, key=speed)
    if "fasttrain" not in best:
        return
    ours = best.pop("fasttrain")
    for name, theirs in best.items():
        pairs = [
            a["images_per_s"] / b["images_per_s"]
            for a, b in zip(turns[ours], turns[theirs], strict=True)
        ]
        if name == "fasttrain loop":  # the loop over the bare step, not the other way round
            pairs = [1 / pair for pair in pairs]
        ratio = round(statistics.median(pairs), 3)
        setting = {"batch": theirs.batch, "precision": theirs.precision}
        modes = {"fasttrain": ours.execution, name: f"{theirs.execution}, {theirs.layout}"}
        key = "loop_over_step" if name == "fasttrain loop" else "speed_over"
        write({**setting, "best": modes, key: {name: ratio}})


# --------------------------------------------------------------------------------------------------
# scaling
# --------------------------------------------------------------------------------------------------


def benchmark_scaling(arguments: argparse.Namespace) -> None:
    if arguments.plot and not arguments.plot.parent.is_dir():
        raise ConfigError(f"--plot {arguments.plot}: there is no such folder; make it")
    import scaling

    from fasttrain.model import build_model

    network = build_model(arguments.arch, arguments.width, 1000, 0.0)
    size = 2 if arguments.gradients == "bf16" else 4
    num_bytes = size * sum(p.numel() for p in network.parameters())
    step_s = arguments.step_ms or measured_steps(arguments)
    inside, latency = arguments.inside * 1e9, arguments.latency / 1e6
    if not inside:
        device = "cuda" if arguments.device == "gpu" else "cpu"
        inside, latency = scaling.measure_links(num_bytes, device)
    figures = scaling.Figures(
        step_s=step_s,
        gradient_bytes=num_bytes,
        per_node=arguments.per_node,
        inside=inside,
        between=arguments.between * 1e9,
        latency_s=latency,
        input_rate=arguments.input_rate,
    )
    write({**machine(), **figures._asdict()})
    counted = (arguments.images, arguments.val_images, arguments.epochs)
    rows = [
        scaling.predict(devices, batch, *counted, figures)
        for batch, devices in itertools.product(arguments.batch, arguments.devices)
        if devices <= batch
    ]
    for row in rows:
        write(row)
    if arguments.plot:
        name = f"MobileNetV3-{arguments.arch.capitalize()} {arguments.width:g}"
        arguments.plot.write_text(scaling.plot(rows, f"{name}, {arguments.crop_px} px, predicted"))


def measured_steps(arguments: argparse.Namespace) -> dict[int, float]:
    """Seconds of an update by its images: medians of the best mode."""
    import scaling

    largest = 1024 if arguments.device == "gpu" else 64
    sizes = [size for size in scaling.powers(largest) if size >= (8 if largest > 64 else 4)]
    options = argparse.Namespace(**vars(arguments) | {"batch": sizes, "part": "scaling"})
    found: dict[int, float] = {}
    for job in step_jobs(options):
        turns = [measure_apart(job, "step") for _ in range(arguments.repeats)]
        if not any("failed" in turn for turn in turns):
            seconds = statistics.median(turn["step_ms"] for turn in turns) / 1e3
            found[job.batch] = min(seconds, found.get(job.batch, seconds))
    return found


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    part = parts.add_parser("shards", help="making shards")
    part.add_argument("source", type=Path, metavar="SOURCE", help="an ImageFolder")
    part.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="(default: %(default)s)"
    )
    part.add_argument("--scratch", type=Path, metavar="DIR", help="where results are written")
    add_input(parts.add_parser("input", help="batches for training"))
    add_step(parts.add_parser("step", help="updates without the input"))
    add_step(parts.add_parser("loop", help="the loop over the bare updates"))
    add_scaling(parts.add_parser("scaling", help="a run on many devices, predicted"))
    if "record" in (sys.argv[1:] if argv is None else argv):  # seconds of imports
        import record

        record.add_arguments(parts.add_parser("record", help="all that this machine can tell"))
    else:
        parts.add_parser("record", help="all that this machine can tell")
    part = parts.add_parser("measure")  # one contestant, in its process
    part.add_argument("kind", choices=["input", "packed", "step", "warm", "profile", "machine"])
    part.add_argument("job")
    arguments = parser.parse_args(argv)
    written.clear()
    try:
        if arguments.part == "measure":
            write(measured(arguments.kind, arguments.job))
            return
        if arguments.part == "shards":
            if not arguments.source.is_dir():
                raise ConfigError(f"{arguments.source} is no folder; name an ImageFolder")
            write(machine())
            benchmark_shards(arguments.source, arguments.repeats, arguments.scratch)
        elif arguments.part == "record":
            record.settle(arguments)
            record.main(arguments)
        elif arguments.part in ("step", "loop", "scaling"):
            settle_step(arguments)
            (benchmark_scaling if arguments.part == "scaling" else benchmark_step)(arguments)
        else:
            benchmark_input(arguments)
    except Fault as fault:
        stop(str(fault))
    finally:
        if arguments.part not in ("record", "measure"):
            summary.show(written)


def measured(kind: str, job: str) -> dict[str, Any]:
    """What `apart.measure_apart` has a process measure; `job` as JSON."""
    if kind == "input":
        return measure_input(Job.model_validate_json(job))
    if kind == "packed":
        import packed

        return packed.measure(Job.model_validate_json(job))
    if kind == "machine":
        import record

        return record.measure_machine(record.MachineJob.model_validate_json(job))
    import steps

    step = steps.StepJob.model_validate_json(job)
    if kind == "warm":
        return steps.warm(step)
    if kind == "profile" and step.gpu:
        import kernels

        return kernels.profile(step)
    return steps.profiled(step) if kind == "profile" else steps.measure(step)


def add_input(part: argparse.ArgumentParser) -> None:
    cpus = str(len(os.sched_getaffinity(0)))
    part.add_argument("shards", type=Path, metavar="SHARDS", help="as make_shards.py writes them")
    part.add_argument(
        "--folder", type=Path, metavar="DIR", help="what they were made of, for torchvision"
    )
    lists = (
        ("--threads", cpus, "workers of everybody (default: the CPUs here, %(default)s)"),
        ("--batch", "256", "images of a batch (default: %(default)s)"),
        ("--queue-depth", "2", "of fasttrain: batches kept ready (default: %(default)s)"),
    )
    for name, default, text in lists:
        part.add_argument(name, type=counts, default=default, metavar="N,...", help=text)
    numbers: tuple[tuple[str, int | None, str], ...] = (
        ("--crop-px", 224, "(default: %(default)s)"),
        ("--images", None, "timed, at least 4 batches a thread (default: 4096, --raw: 65536)"),
        ("--repeats", 3, "(default: %(default)s)"),
    )
    for name, number, text in numbers:
        part.add_argument(name, type=positive, default=number, metavar="N", help=text)
    part.add_argument("--raw", action="store_true", help="reading alone, without decoding")
    part.add_argument("--cold", action="store_true", help="not from the page cache")
    part.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="where images are made; gpu: every way to decode of fasttrain, and DALI's reader",
    )


MODES: tuple[str, ...] = typing.get_args(config.Mode)


def add_step(part: argparse.ArgumentParser) -> None:
    part.add_argument("--arch", choices=["large", "small"], default="large")
    part.add_argument("--width", type=amount, default=1.0, metavar="W", help="1 or 0.75 for timm")
    part.add_argument("--crop-px", type=positive, default=224, metavar="N")
    part.add_argument("--device", choices=["cpu", "gpu"], help="(default: a GPU if there is one)")
    part.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N")
    part.add_argument("--seconds", type=amount, metavar="S", help="timed (default: 4; GPU: 2)")
    part.add_argument("--repeats", type=positive, metavar="N", help="turns (default: 3; GPU: 2)")
    part.add_argument("--profile", action="store_true", help="operations of fasttrain by time")
    part.add_argument(
        "--deterministic", action="store_true", help="what train.deterministic costs, as well"
    )
    part.add_argument("--batch", type=counts, metavar="N,...", help="(default: 1024; CPU: 64)")
    lists = (
        ("--modes", MODES, "(default: all; CPU: eager, as compiling takes two minutes each)"),
        ("--precision", ("bf16", "fp16", "no"), "(default: bf16; CPU: no)"),
    )
    for name, known, text in lists:
        part.add_argument(name, type=partial(words, known), metavar="A,B", help=text)


def add_scaling(part: argparse.ArgumentParser) -> None:
    import scaling

    add_step(part)
    part.set_defaults(batch=[1024, 4096], repeats=1)
    part.add_argument("--step-ms", type=scaling.step_times, metavar="IMAGES:MS,...")
    numbers = (
        ("--per-node", positive, 8, "devices of a node"),
        ("--inside", amount, 0.0, "GB/s between them (default: measured here, with --latency)"),
        ("--between", amount, 12.5, "GB/s between nodes"),
        ("--latency", amount, 20.0, "microseconds of a message"),
        ("--input-rate", amount, None, "images/s of a node's input, as benchmark.py input tells"),
        ("--images", positive, 1_281_167, "training images"),
        ("--val-images", positive, 50_000, "validation images"),
        ("--epochs", positive, 150, "of the run"),
    )
    for name, kind, default, text in numbers:
        text += "" if default is None or name == "--inside" else " (default: %(default)s)"
        part.add_argument(name, type=kind, default=default, metavar="N", help=text)
    part.add_argument("--plot", type=Path, metavar="FILE.svg", help="draws images/s over devices")
    part.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32")
    part.add_argument(
        "--devices", type=counts, default=scaling.powers(512), metavar="N,...", help="(1 to 512)"
    )


def words(known: Sequence[str], text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return text.split(",")


def settle_step(arguments: argparse.Namespace) -> None:
    """Fills in what depends on the device."""
    import torch

    if arguments.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--device gpu: torch finds no GPU here; leave it out")
    arguments.device = arguments.device or ("gpu" if torch.cuda.is_available() else "cpu")
    gpu = arguments.device == "gpu"
    arguments.repeats = arguments.repeats or (2 if gpu else 3)
    arguments.seconds = arguments.seconds or (2.0 if gpu else 4.0)
    arguments.batch = arguments.batch or [1024 if gpu else 64]
    arguments.precision = arguments.precision or ["bf16" if gpu else "no"]
    arguments.modes = arguments.modes or [*MODES] if gpu else arguments.modes or ["eager"]
    if not gpu and any("graph" in mode for mode in arguments.modes):
        raise ConfigError("--modes: a CUDA graph needs a GPU; use eager,compile")


def amount(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def counts(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


if __name__ == "__main__":
    main()

"""Stores a teacher's answers to the images that a run will see, so that the run learns from them.

    python tools/label.py TEACHER RECIPE [OUT]

The run's own loader makes the images: crop, flip and augmentation are functions of seed, epoch and
image, so the run will see the same ones. For each image and view, OUT gets the most probable
classes and their probabilities. Then train with --set distill.labels=OUT. OUT may be left out if
the recipe sets `distill.labels`.

TEACHER is one of
  - a run folder, a checkpoint, a file or folder that export.py wrote, or another file of weights
    (--teacher-recipe then describes its network)
  - torchvision:NAME or timm:NAME, such as torchvision:resnet50, with the weights that the package
    has in its cache or downloads, or with --teacher-weights FILE

RECIPE is the recipe of the run, the student's. `distill.views` is the number of views of each
image that are labelled; if it is 0, one for each of `train.epochs`.

If it is stopped, the same command makes what is missing. If `accelerate launch` starts several
processes, they share the work. The last line on standard output is one JSON object.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import fasttrain
from fasttrain import (
    commands,
    config,
    display,
    files,
    launch,
    schedule,
    shards,
    teacher_labels,
)
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError, Fault, stop
from fasttrain.sampling import View
from fasttrain.teacher_labels import Index, LabelsError, Part

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from fasttrain.batch import Batch, Placement
    from fasttrain.distilling import Teacher
    from fasttrain.runtime import Process
    from fasttrain.schedule import Plan

TOP_K = 10
LOCK = "lock"
WAIT = timedelta(hours=12)  # for another rank: the last file of a large teacher takes long on a CPU


def main() -> None:
    arguments = parse()
    joined = False
    try:
        launch.settle(os.environ, "no")
        launch.check_processes(os.environ)
        job = open_job(arguments)
        teacher = open_teacher(arguments, job)
        joined = True
        label(job, teacher)
    except Fault as fault:
        # Every rank raises the same faults before it has opened the teacher.
        stop(str(fault), everywhere=joined and not fault.raised_on_every_rank)
    except KeyboardInterrupt:
        say("stopped; the same command makes what is missing")
        raise SystemExit(130) from None
    except OSError as error:
        why = error.strerror or error
        path = error.filename or arguments.out
        stop(
            f"{path}: cannot be written ({why}); complete files stay, and the same command "
            "continues",
            everywhere=True,
        )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", metavar="TEACHER")
    config.add_arguments(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", nargs="?", help="a folder (default: distill.labels)"
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        default=TOP_K,
        metavar="K",
        help="classes that are stored for an image; a label takes 4 bytes for each (default: "
        "%(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=128, help="(default: %(default)s)")
    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument(
        "--teacher-weights", type=Path, metavar="FILE", help="of torchvision:NAME or timm:NAME"
    )
    teacher.add_argument(
        "--teacher-recipe",
        type=Path,
        metavar="RECIPE",
        help="the recipe of the teacher's network, if its file of weights does not describe it",
    )
    teacher.add_argument(
        "--teacher-px",
        type=positive,
        metavar="N",
        help="resize the run's images to N pixels for the teacher (default: as they are)",
    )
    teacher.add_argument(
        "--ema", action="store_true", help="use the moving average of the teacher's weights"
    )
    teacher.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the teacher's class names, one per line; without names, 1,000 classes are ImageNet's",
    )
    teacher.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="of the teacher; no is float32 (default: %(default)s)",
    )
    return parser.parse_intermixed_args()  # OUT may follow options


# --------------------------------------------------------------------------------------------------
# What is labelled
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """The images of a run, and where their labels go."""

    recipe: config.Recipe
    plan: "Plan"
    split: shards.Split
    out: Path
    top_k: int
    batch_size: int
    precision: str
    teacher_px: int | None

    def view(self, number: int) -> View:
        """The view of a number: that of the first epoch in which the run has it."""
        px = schedule.crop_px_at(number, self.recipe.data.crop_px)
        return View(self.plan.draw_seed, number, px)

    def index(self, teacher: "Teacher", strategy: str) -> Index:
        """What `labels.json` says before the first view is complete."""
        return Index(
            version=teacher_labels.FORMAT_VERSION,
            subject=teacher_labels.subject_of(self.recipe, self.split, self.plan.draw_seed),
            teacher=teacher_labels.Teacher(
                name=teacher.name,
                weights=teacher.digest,
                px=self.teacher_px,
                precision=self.precision,
            ),
            top_k=self.top_k,
            num_samples=self.split.num_samples,
            part_samples=teacher_labels.PART_SAMPLES,
            decoder=strategy,
            made_by=fasttrain.__version__,
            sha256=[],
        )


def open_job(arguments: argparse.Namespace) -> Job:
    """Opens the recipe and its training images.

    Raises:
        Fault: the recipe is wrong, or the data set is missing or damaged.
    """
    recipe = config.load(commands.recipe(arguments.recipe), arguments.set)
    out = arguments.out or recipe.distill.labels
    if out is None:
        raise ConfigError("OUT is missing: name a folder, or set [distill] labels in the recipe")
    shards.check_unchanged(recipe.data.root)
    split = shards.open_split(recipe.data.root, "train", recipe.data.short_side)
    plan = schedule.make_plan(recipe.train, recipe.optim, split.num_samples, 1, recipe.distill)
    return Job(
        recipe=recipe,
        plan=plan,
        split=split,
        out=out,
        top_k=min(arguments.top_k, len(split.classes)),
        batch_size=min(arguments.batch_size, split.num_samples),
        precision=arguments.precision,
        teacher_px=arguments.teacher_px,
    )


def open_teacher(arguments: argparse.Namespace, job: Job) -> "Teacher":
    """Reads the teacher.

    Raises:
        Fault: there is no such network, its weights cannot be used, or it lacks classes.
    """
    # These imports take seconds, so they come after the arguments are checked.
    import teachers

    from fasttrain import trained

    foreign = teachers.FOREIGN.fullmatch(arguments.teacher)
    wrong = {
        "--teacher-weights": arguments.teacher_weights and not foreign,
        "--teacher-recipe": arguments.teacher_recipe and foreign,
        "--ema": arguments.ema and foreign,
    }
    for option, is_wrong in wrong.items():
        if is_wrong:
            kind = "networks of fasttrain" if foreign else "torchvision:NAME and timm:NAME"
            raise ConfigError(f"{option}: is for {kind}; leave it out for {arguments.teacher}")
    names = job.split.classes
    wanted = teachers.Wanted(
        arguments.teacher, arguments.teacher_weights, arguments.classes, arguments.teacher_px
    )
    if foreign:
        return teachers.foreign_teacher(wanted, job.recipe, names)
    path = Path(arguments.teacher)
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file or folder; name a run folder, a checkpoint, a file of "
            "weights, torchvision:NAME or timm:NAME"
        )
    given = config.load(arguments.teacher_recipe) if arguments.teacher_recipe else None
    found, chosen = trained.weights_and_recipe(path, arguments.ema, given, say)
    if chosen is None:
        raise ConfigError(
            f"{path} is a file of weights that does not describe its network: give its recipe, "
            "such as --teacher-recipe recipes/large.toml"
        )
    return teachers.fasttrain_teacher((found, chosen), wanted, job.recipe, names)


# --------------------------------------------------------------------------------------------------
# Labelling
# --------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What a rank has labelled."""

    images: int
    right: int  # images whose most probable class is their label


def label(job: Job, teacher: "Teacher") -> None:
    """Labels what is missing, and prints the result. Every rank must call this.

    Raises:
        Fault: OUT cannot be used, or the precision needs a GPU.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    accelerator, process, placement, strategy = join(job)
    main = accelerator.is_main_process
    begun = time.perf_counter()
    with held(job.out) if main else nullcontext():
        found: list[Any] = [None, None]
        if main:
            say(describe(job, teacher, process))
            index = prepare(job, job.index(teacher, strategy))
            found = [index, missing(job, index)]
        index, parts = broadcast_object_list(found)
        own = parts[process.rank :: process.world_size]
        total = job.plan.num_views * len(index.parts_of(0))
        if main and len(parts) < total:
            say(f"{total - len(parts):,} of {total:,} files are there already")
        counts = label_parts(job, index, own, teacher, (accelerator, placement))
        both = gather_object([counts])  # every rank has written its files
        if main:
            finish(job, index)
            result = summary(job, both, time.perf_counter() - begun)
            sys.stdout.write(json.dumps(result) + "\n")
    accelerator.end_training()


def join(job: Job) -> tuple["Accelerator", "Process", "Placement", str]:
    """Chooses the decoder, and joins the process group. Every rank must call this.

    Returns:
        What the rank works with, and the decoder's strategy.
    Raises:
        Fault: the precision needs a GPU, or no decoder works.
    """
    from fasttrain import decoding, gpus, makers, runtime
    from fasttrain.batch import Placement, half_images

    gpu = gpus.has_gpu(os.environ)
    if job.precision == "fp16" and not gpu:
        raise launch.LaunchError("--precision fp16: needs a GPU; use bf16 or no")
    half = half_images(gpu, job.precision)
    threads = runtime.data_threads(job.recipe.data, os.environ)
    task = decoding.Job(gpu, threads, job.batch_size, half)
    # Before this process uses the GPU.
    decoder, why = decoding.choose_decoder(job.split, job.recipe.data, task, os.environ)
    accelerator = runtime.accelerator_for(job.precision, WAIT)
    process = runtime.start(accelerator, job.recipe, os.environ)
    if accelerator.is_main_process:
        say(why)
    placement = Placement(process.device, half, process.data_threads, decoder)
    strategy = makers.decoder_of(job.split, job.recipe.data, placement).strategy
    return accelerator, process, placement, strategy


def describe(job: Job, teacher: "Teacher", process: "Process") -> str:
    """Says what will be stored, and how much space it takes."""
    images = job.plan.num_views * job.split.num_samples
    size = f" at {job.teacher_px} px" if job.teacher_px else ""
    return (
        f"teacher: {teacher.name}{size}, on {process.world_size} x {process.device.type}, "
        f"precision {job.precision}\n"
        f"images: {job.split.num_samples:,} of {job.recipe.data.root}, {job.plan.num_views:,} "
        f"views of each, seed of the draws {job.plan.draw_seed}\n"
        f"labels: the {job.top_k} most probable of {len(job.split.classes):,} classes, "
        f"{display_bytes(images * job.top_k * 4)} in {job.out}"
    )


def display_bytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes the folder, and holds its lock.

    Raises:
        ConfigError: the folder holds other files, or another process labels there.
    """
    out.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in out.iterdir() if path.name != LOCK]
    if others and not (out / teacher_labels.INDEX).exists():
        raise ConfigError(f"{out} holds other files ({sorted(others)[0]}); choose an empty folder")
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # the file system may have no locks
            if not files.lock(file, wait_s=0):
                raise ConfigError(f"{out} is in use by another process; wait for it, or stop it")
        yield
    finally:
        os.close(file)


def prepare(job: Job, wanted: Index) -> Index:
    """Returns the index that is there, or writes the first one.

    Raises:
        LabelsError: the folder holds labels of another teacher or of other images.
        ConfigError: the disk has too little space.
    """
    files.clear(job.out)
    if not (job.out / teacher_labels.INDEX).exists():
        needed = job.plan.num_views * job.split.num_samples * wanted.row.itemsize
        if (free := shutil.disk_usage(job.out).free) < needed:
            raise ConfigError(
                f"{job.out}: has {display_bytes(free)} of free space, the labels need "
                f"{display_bytes(needed)}; free some, or lower --top-k or distill.views"
            )
        teacher_labels.write_index(job.out, wanted)
        return wanted
    index = teacher_labels.read_index(job.out)
    differs = index.subject.differences(wanted.subject)
    old, new = (
        {
            "the code of the images": each.subject.code,
            "--top-k": each.top_k,
            **{f"the teacher's {key}": value for key, value in each.teacher if key != "name"},
        }
        for each in (index, wanted)
    )
    differs += [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]
    if differs:
        raise LabelsError(
            "\n  ".join([f"{job.out} holds other labels:", *differs])
            + "\nuse the old values, or another folder"
        )
    return index


def missing(job: Job, index: Index) -> list[Part]:
    """The files of the wanted views that are missing or damaged."""
    parts = [part for view in range(job.plan.num_views) for part in index.parts_of(view)]
    with ThreadPoolExecutor(job.recipe.data.read_threads) as pool:
        found = pool.map(lambda part: teacher_labels.sha256_of(job.out, part, index.row), parts)
        return [part for part, sha256 in zip(parts, found, strict=True) if sha256 is None]


def label_parts(
    job: Job,
    index: Index,
    parts: list[Part],
    teacher: "Teacher",
    where: tuple["Accelerator", "Placement"],
) -> Counts:
    """Labels the images of some files, and writes each file when it is complete."""
    import torch

    from fasttrain import loaders
    from fasttrain.order import ViewOrder

    accelerator, placement = where
    teacher.module.to(placement.device).to(memory_format=torch.channels_last)
    ranges = [(job.view(part.view), part.first, part.last) for part in parts]
    order = ViewOrder(job.split, job.recipe.data, ranges, job.batch_size)
    left, images, right = iter(parts), 0, 0
    part, rows = next(left, None), list[np.ndarray[Any, Any]]()
    for batch in shown(accelerator, loaders.Loader(order, placement), parts):
        assert part and batch.draw
        with torch.inference_mode(), accelerator.autocast():
            logits = teacher.module(batch.images)
        rows.append(rows_of(logits, index))
        images += len(batch.labels)
        right += int((rows[-1]["ids"][:, 0] == job.split.label[batch.draw.ids]).sum())
        if sum(map(len, rows)) == part.last - part.first:
            teacher_labels.write_part(job.out, part, np.concatenate(rows))
            part, rows = next(left, None), []
    return Counts(images, right)


def rows_of(logits: "Tensor", index: Index) -> "np.ndarray[Any, Any]":
    """The rows that are stored for logits `(B, C)`.

    Raises:
        ConfigError: a logit is not finite.
    """
    probabilities, ids = logits.float().softmax(1).topk(index.top_k)
    rows = np.empty(len(logits), index.row)
    rows["ids"], rows["probabilities"] = ids.cpu().numpy(), probabilities.cpu().numpy()
    if not np.isfinite(rows["probabilities"]).all():
        raise ConfigError(
            "the teacher's logits are not finite: its weights are broken, or --precision fp16 is "
            "too small for it; use --precision bf16 or no"
        )
    return rows


def shown(
    accelerator: "Accelerator", batches: "Iterable[Batch]", parts: list[Part]
) -> "Iterator[Batch]":
    """Yields the batches. Rank 0 shows the progress of all ranks, which have equal shares."""
    if not accelerator.is_main_process or not parts:
        yield from batches
        return
    world_size = accelerator.num_processes
    total = world_size * sum(part.last - part.first for part in parts)
    with display.progress(total, "labelling") as advance:
        for batch in batches:
            yield batch
            advance(len(batch.labels) * world_size, 0)


def finish(job: Job, index: Index) -> None:
    """Writes the checksums of all complete views into the index.

    Raises:
        LabelsError: a file is damaged, although it was written just now.
    """
    views = range(max(job.plan.num_views, len(index.sha256)))
    with ThreadPoolExecutor(job.recipe.data.read_threads) as pool:
        found = [
            [*pool.map(lambda part: teacher_labels.sha256_of(job.out, part, index.row), parts)]
            for parts in map(index.parts_of, views)
        ]
    complete = 0
    while complete < len(found) and all(found[complete]):
        complete += 1
    sha256 = [[text for text in row if text] for row in found[:complete]]
    teacher_labels.write_index(job.out, index.model_copy(update={"sha256": sha256}))
    if complete < job.plan.num_views:
        raise LabelsError(f"{job.out}: a file of view {complete} is damaged; run this again")


def summary(job: Job, counts: list[Counts], seconds: float) -> dict[str, Any]:
    """The result for programs."""
    images, right = (sum(column) for column in zip(*counts, strict=True))
    result: dict[str, Any] = {
        "labels": str(job.out),
        "views": job.plan.num_views,
        "images": images,
        "images_per_s": round(images / seconds, 1),
    }
    if images:
        result["teacher_top1"] = round(100 * right / images, 3)  # on these training images
    return result


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()

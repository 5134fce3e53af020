"""Draws what the network will see: the batch of an update, before anything is trained.

    python tools/preview.py RECIPE OUT.png [--update N] [--images N] [--set SECTION.KEY=VALUE ...]

Each image of the batch stands beside its original, on which the crop window is drawn. The pixels
are those of the run's own loader, with only the normalisation undone. With MixUp or CutMix, the
mixed image follows. If the image size varies (a schedule in `data.crop_px`, or `data.scales_px`),
one row per image size comes below.

The batch is that of a run of one process. Other numbers of processes have the same images, but
with MixUp or CutMix they may mix others. The last line on standard output is one JSON object: it
says where in the picture each image is.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain import config, files, reading, schedule, settled, shards
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError, Fault, stop
from fasttrain.order import TrainingOrder
from fasttrain.sampling import Augment, Draw

if TYPE_CHECKING:
    from PIL import Image

    from fasttrain.batch import Placement
    from fasttrain.mixing import Mix

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}
LARGEST_PX = {"PNG": 2**31 - 1, "JPEG": 65_535, "WEBP": 16_383}  # sides of a picture
IMAGES = 16
SHAPE = 1.5  # width over height of the grid, roughly
MARGIN, BETWEEN_CELLS, BETWEEN_TILES = 32, 28, 8  # pixels
NAME, LINE = 28, 18  # heights of a cell's text: its class name, and each further line
STAGE_TEXT = 170  # width of the text before a stage's images
NARROWEST = 900  # so that the text at the top has some room
FRAME, DIMMED = (255, 196, 0), 0.35  # of the crop window; brightness outside of it
BESIDE = (240, 241, 244)  # colour beside an original that is not square


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config.add_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .png, .jpg or .webp file")
    parser.add_argument(
        "--update", type=int, default=0, metavar="N", help="counted from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help=f"the first N images of the batch (default: {IMAGES}, or all if there are fewer)",
    )
    arguments = parser.parse_args(argv)
    try:
        check_out(arguments.out)
        recipe, changes = settled.for_training(
            config.load(arguments.recipe, arguments.set), os.environ
        )
        say(*changes)
        job = open_job(recipe, arguments.update, arguments.images)
        found = draw_picture(job, arguments.recipe.name)
        save(found.picture, arguments.out)
    except Fault as fault:
        stop(str(fault))
    sys.stdout.write(json.dumps({"picture": str(arguments.out), **found.about}) + "\n")


def check_out(out: Path) -> None:
    """Checks that a picture can be written to `out`.

    Raises:
        ConfigError: the suffix names no format, or there is no such folder.
    """
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"{out}: its suffix must be one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file")


def save(picture: "Image.Image", out: Path) -> None:
    """Writes the picture in the format of its suffix.

    Raises:
        ConfigError: the format allows no such size, or the file system refused.
    """
    options = FORMATS[out.suffix.lower()]
    largest = LARGEST_PX[options["format"]]
    if max(picture.size) > largest:
        raise ConfigError(
            f"{out}: the picture has {picture.width:,} x {picture.height:,} pixels, but "
            f"{options['format']} allows {largest:,} a side; use .png, or fewer --images"
        )
    try:
        with files.atomic(out) as file:
            picture.save(file, **options)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error})") from None


# --------------------------------------------------------------------------------------------------
# The images
# --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is drawn."""

    recipe: config.Recipe
    split: shards.Split
    plan: schedule.Plan
    step: int  # the update
    num_images: int


class Example(NamedTuple):
    """An image of a batch."""

    sample: int  # id in the split
    name: str  # of its class
    window: tuple[int, int, int, int]  # x, y, width, height in pixels of the original
    mirrored: bool
    pixels: NDArray[np.uint8]  # (S, S, 3): what the loader hands over
    changes: str  # the augmentations
    mixed: NDArray[np.uint8] | None  # (S, S, 3)
    labels: str  # of the mixed image


def open_job(recipe: config.Recipe, step: int, images: int | None) -> Job:
    """Opens the training images, and checks that the run has this update and so many images.

    Raises:
        Fault: it has not, or the data set is missing or damaged.
    """
    root = recipe.data.root
    shards.check_unchanged(root)
    split = shards.open_split(root, "train", recipe.data.short_side)
    reading.check_open_files(split)
    plan = schedule.make_plan(recipe.train, recipe.optim, split.num_samples, 1, recipe.distill)
    if not 0 <= step < plan.total_steps:
        raise ConfigError(
            f"--update {step}: the run has {plan.total_steps:,} updates, from 0 to "
            f"{plan.total_steps - 1}"
        )
    if images and images > plan.global_batch_size:
        raise ConfigError(
            f"--images {images}: an update has {plan.global_batch_size:,} images; lower it"
        )
    return Job(recipe, split, plan, step, images or min(IMAGES, plan.global_batch_size))


class FirstImages(TrainingOrder):
    """The first images of one update, drawn as the run draws them.

    If images are mixed, each micro-batch begins with its last image, because that one is mixed with
    its first image.
    """

    def __init__(self, job: Job, mixed: bool) -> None:
        super().__init__(job.split, job.recipe.data, job.plan, 0, job.step)
        self.count, self.mixed = job.num_images, mixed
        self.batch_size = min(job.num_images, job.plan.micro_batch_size) + mixed

    def numbers(self, iteration: int) -> range:
        first = self.first_step * self.plan.accumulation
        return range(first, first - (-self.count // self.plan.micro_batch_size))

    def draw(self, number: int) -> Draw:
        whole, size = super().draw(number), self.plan.micro_batch_size
        rows = np.arange(min(size, self.count - number % self.plan.accumulation * size))
        if self.mixed:
            rows = np.concatenate([[size - 1], rows])
        columns = whole.augment._asdict()
        changes = {name: column[rows] for name, column in columns.items() if column is not None}
        return whole._replace(
            ids=whole.ids[rows],
            windows=whole.windows[rows],
            flips=whole.flips[rows],
            augment=Augment(**changes),
        )


def examples_of(job: Job, placement: "Placement", mix: "Mix | None") -> list[Example]:
    """Makes the first images of an update by the run's own loader.

    Args:
        mix: mixes a micro-batch; None mixes nothing.
    """
    from fasttrain import loaders, mixing, pictures

    found, plan, split = [], job.plan, job.split
    for group, batch in enumerate(loaders.Loader(FirstImages(job, mix is not None), placement)):
        assert batch.draw
        tiles, mixed, targets, first = pictures.pixels(batch.images), None, None, 0
        if mix:
            place = plan.seed, job.step, group
            images, labels = mixing.mix_at(mix, batch.images, batch.labels, place)
            mixed, targets, first = pictures.pixels(images), labels.cpu().numpy(), 1
        for row in range(first, len(tiles)):
            sample = int(batch.draw.ids[row])
            x, y, w, h = batch.draw.windows[row].tolist()
            found.append(
                Example(
                    sample=sample,
                    name=split.classes[split.label[sample]],
                    window=(x, y, w, h),
                    mirrored=bool(batch.draw.flips[row]),
                    pixels=tiles[row],
                    changes=describe_changes(batch.draw.augment, row),
                    mixed=None if mixed is None else mixed[row],
                    labels="" if targets is None else describe_labels(targets[row], split.classes),
                )
            )
    return found


def describe_changes(augment: Augment, row: int) -> str:
    """Names the augmentations of an image: `rotate, solarize, erased`."""
    names = []
    if augment.operations is not None:
        from fasttrain.augment import OPERATIONS  # needs DALI, which has made the images

        known = [*OPERATIONS]
        names += [known[number].replace("_", " ") for number in augment.operations[row, :, 0]]
    if augment.jitter is not None:
        names.append("jitter")
    if augment.erase is not None and augment.erase[row].any():
        names.append("erased")
    return ", ".join(names)


def describe_labels(target: NDArray[np.float32], classes: Sequence[str]) -> str:
    """Names the labels of a mixed image: `62 % tench + 38 % church`.

    Args:
        target: the probability of each class, `(C,)`.
    """
    order = [int(label) for label in np.argsort(-target)[:2] if target[label] > 0]
    return " + ".join(f"{100 * target[label]:.0f} % {classes[label]}" for label in order)


class Stage(NamedTuple):
    """The updates of one image size: a part of the size schedule, or a size of `data.scales_px`."""

    first_epoch: int
    last_epoch: int
    px: int
    update: int  # the first one


def stages_of(data: config.Data, plan: schedule.Plan) -> list[Stage]:
    """The image sizes that the run reaches, in the recipe's order; none if the size is constant."""
    last = plan.epoch_of(plan.total_steps - 1)
    if data.scales_px:
        first = schedule.first_updates(0, plan, data)
        return [
            Stage(plan.epoch_of(first[px]), last, px, first[px])
            for px in data.scales_px
            if px in first
        ]
    if isinstance(data.crop_px, int):
        return []
    begun = [(epoch, px) for epoch, px in data.crop_px if epoch <= last]
    ends = [epoch - 1 for epoch, _ in begun[1:]] + [last]
    return [
        Stage(epoch, end, px, epoch * plan.steps_per_epoch)
        for (epoch, px), end in zip(begun, ends, strict=True)
    ]


def when(stage: Stage, data: config.Data) -> str:
    """Says which updates have the size of a stage."""
    if data.scales_px:
        return f"1 of {len(data.scales_px)} updates"
    if stage.last_epoch > stage.first_epoch:
        return f"epochs {stage.first_epoch} to {stage.last_epoch}"
    return f"epoch {stage.first_epoch}"


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A picture, and where its images are."""

    picture: "Image.Image"
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """The grid of cells. A cell has two or three tiles in a row, and lines of text below."""

    count: int
    side: int  # of a tile, in pixels
    tiles: int  # in a cell
    lines: int  # of small text in a cell

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a cell, with the space to the next one."""
        return self.width + BETWEEN_CELLS, self.side + NAME + LINE * self.lines + 22

    @property
    def width(self) -> int:
        """Width of a cell."""
        return self.tiles * (self.side + BETWEEN_TILES) - BETWEEN_TILES

    @property
    def columns(self) -> int:
        """The number of columns that brings the grid nearest to `SHAPE`."""
        width, height = self.cell

        def distance(columns: int) -> float:
            shape = columns * width / (-(-self.count // columns) * height)
            return abs(math.log(shape / SHAPE))

        return min(range(1, self.count + 1), key=distance)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid."""
        width, height = self.cell
        return self.columns * width - BETWEEN_CELLS, -(-self.count // self.columns) * height

    def corner(self, number: int, tile: int) -> tuple[int, int]:
        """x and y of a tile of a cell, relative to the grid."""
        width, height = self.cell
        row, column = divmod(number, self.columns)
        return column * width + tile * (self.side + BETWEEN_TILES), row * height


def draw_picture(job: Job, title: str) -> Found:
    """Makes the images and draws them.

    Args:
        title: names the recipe.
    Raises:
        Fault: the images cannot be read or decoded.
    """
    import torch

    from fasttrain import gpus, mixing, pictures, runtime, session
    from fasttrain.batch import Placement, half_images

    recipe = job.recipe
    decoder, _ = session.try_decoders(recipe, job.plan, job.split)
    gpu = gpus.has_gpu(os.environ)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    half = half_images(gpu, recipe.train.precision)
    threads = runtime.data_threads(recipe.data, os.environ)
    placement = Placement(device, half, threads, decoder)
    mix = mixing.build_mix(recipe.train, len(job.split.classes))
    examples = examples_of(job, placement, mix)
    px = len(examples[0].pixels)
    factor = pictures.enlargement(px)
    lines = 1 + any(example.changes for example in examples) + bool(mix)
    layout = Layout(len(examples), factor * px, 3 if mix else 2, lines)
    width = max(layout.size[0], NARROWEST, STAGE_TEXT + stage_side(job))
    first = [head(job, title, device.type, factor, width), grid_of(examples, job, layout, width)]
    top = MARGIN + first[0].height
    images = [
        {
            "sample": example.sample,
            "class": example.name,
            "window": example.window,
            "mirrored": example.mirrored,
            "labels": example.labels or example.name,
            "tiles": [
                [MARGIN + x, top + y]
                for x, y in (layout.corner(number, tile) for tile in range(layout.tiles))
            ],
        }
        for number, example in enumerate(examples)
    ]
    rows, stages = stage_rows(job, placement, width, MARGIN + sum(block.height for block in first))
    about = {
        "update": job.step,
        "epoch": job.plan.epoch_of(job.step),
        "px": px,
        "enlarged": factor,
        "images": images,
        "stages": stages,
    }
    return Found(stacked([*first, *rows]), about)


def stacked(blocks: Sequence["Image.Image"]) -> "Image.Image":
    """Pictures of the same width under each other, with a margin around them."""
    from fasttrain import pictures

    height = sum(block.height for block in blocks)
    canvas = pictures.blank(blocks[0].width + 2 * MARGIN, height + 2 * MARGIN)
    y = MARGIN
    for block in blocks:
        canvas.paste(block, (MARGIN, y))
        y += block.height
    return canvas


def head(job: Job, title: str, device: str, factor: int, width: int) -> "Image.Image":
    """The title, the settings and the legend."""
    from fasttrain import pictures

    data, train, plan = job.recipe.data, job.recipe.train, job.plan
    epoch, last = plan.epoch_of(job.step), plan.epoch_of(plan.total_steps - 1)
    larger = f", enlarged {factor} times" if factor > 1 else ""
    legend = "Left: the stored image with its crop window."
    exact = "the exact pixels that the loader hands over"
    if train.mixup_alpha or train.cutmix_alpha:
        legend += (
            f" Middle: {exact}. Right: its mixture with another image, as the network sees it."
        )
    else:
        legend += f" Right: {exact}."
    texts = [
        f"{job.num_images:,} of {plan.global_batch_size:,} images from {data.root}, made on the "
        f"{device.upper().replace('CUDA', 'GPU')}. Crops of "
        f"{schedule.image_px(job.step, plan, data)} px{larger}.",
        describe_settings(data, train),
        legend,
        f"The run has updates 0 to {plan.total_steps - 1:,} and epochs 0 to {last:,}.",
    ]
    lines = [line for text in texts for line in pictures.lines_of(text, 15, width)]
    canvas = pictures.blank(width, 44 + 22 * len(lines) + 20)
    heading = f"{title}: update {job.step:,}, epoch {epoch:,}"
    pictures.write(canvas, (0, 0), heading, 28, width=width)
    for number, line in enumerate(lines):
        pictures.write(canvas, (0, 44 + 22 * number), line, 15, pictures.GREY)
    return canvas


def describe_settings(data: config.Data, train: config.Train) -> str:
    """The settings that change the images, in one sentence."""
    low, high = data.crop_area
    parts = [f"Crop area {low:g} to {high:g}", f"{data.interpolation} resizing"]
    parts += ["mirrored with probability 0.5"] if data.flip else []
    if data.augment == "rand":
        parts.append(f"RandAugment ({data.augment_ops} of strength {data.augment_magnitude})")
    parts += ["TrivialAugment"] if data.augment == "trivial" else []
    if any(data.color_jitter):
        parts.append(f"colour jitter {', '.join(f'{value:g}' for value in data.color_jitter)}")
    parts += [f"erasing {data.erase:g}"] if data.erase else []
    parts += [f"MixUp {train.mixup_alpha:g}"] if train.mixup_alpha else []
    parts += [f"CutMix {train.cutmix_alpha:g}"] if train.cutmix_alpha else []
    return f"{', '.join(parts)}."


def grid_of(examples: Sequence[Example], job: Job, layout: Layout, width: int) -> "Image.Image":
    """The grid of cells."""
    from fasttrain import pictures

    canvas = pictures.blank(width, layout.size[1])
    for number, example in enumerate(examples):
        tiles = [with_window(example, job.split, layout.side)]
        for shown in (example.pixels, example.mixed):
            if shown is not None:
                tiles.append(pictures.enlarged(shown, layout.side // len(shown)))
        for place, tile in enumerate(tiles):
            canvas.paste(tile, layout.corner(number, place))
        x, y = layout.corner(number, 0)
        pictures.write(canvas, (x, y + layout.side + 6), example.name, 16, width=layout.width)
        full = job.split.width[example.sample], job.split.height[example.sample]
        small = [f"{full[0]} x {full[1]} px, crop {example.window[2]} x {example.window[3]}"]
        small += [text for text in (example.changes, example.labels) if text]
        for line, text in enumerate(small):
            at = x, y + layout.side + NAME - 1 + LINE * line
            pictures.write(canvas, at, text, 13, pictures.GREY, layout.width)
    return canvas


def with_window(example: Example, split: shards.Split, side: int) -> "Image.Image":
    """The original in a square, darkened outside of the crop window, which has a frame."""
    from PIL import Image, ImageDraw

    from fasttrain import pictures

    source = pictures.original(split, example.sample)
    scale = side / max(source.size)
    size = max(1, round(source.width * scale)), max(1, round(source.height * scale))
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    shown = source.resize(size, kind)
    x, y, w, h = example.window
    box = round(x * scale), round(y * scale), round((x + w) * scale), round((y + h) * scale)
    dark = shown.point(lambda value: int(value * DIMMED))
    dark.paste(shown.crop(box), box[:2])
    canvas = pictures.blank(side, side, BESIDE)
    corner = (side - size[0]) // 2, (side - size[1]) // 2
    canvas.paste(dark, corner)
    drawing = ImageDraw.Draw(canvas)
    left, top = corner[0] + box[0], corner[1] + box[1]
    edge = left, top, max(left, corner[0] + box[2] - 1), max(top, corner[1] + box[3] - 1)
    drawing.rectangle(edge, outline=FRAME, width=2)
    if example.mirrored:
        font = pictures.font(13)
        badge = round(font.getlength("mirrored")) + 12
        drawing.rounded_rectangle((6, side - 26, 6 + badge, side - 6), 4, pictures.INK)
        drawing.text((12, side - 24), "mirrored", pictures.PAPER, font)
    return canvas


def stage_side(job: Job) -> int:
    """Side of the largest tile in the rows of the image sizes; 0 if the size is constant."""
    from fasttrain import pictures

    px = max((stage.px for stage in stages_of(job.recipe.data, job.plan)), default=0)
    return px * pictures.enlargement(px) if px else 0


def stage_rows(
    job: Job, placement: "Placement", width: int, top: int
) -> tuple[list["Image.Image"], list[dict[str, Any]]]:
    """One row of images for each image size of the run, at the true ratio of the sizes.

    Args:
        top: y of the first row in the picture.
    Returns:
        The rows, below their title; and what the JSON object says about each.
    """
    from fasttrain import pictures

    stages = stages_of(job.recipe.data, job.plan)
    if not stages:
        return [], []
    step_x = stage_side(job) + BETWEEN_TILES
    factor = stage_side(job) // max(stage.px for stage in stages)
    count = min((width - STAGE_TEXT + BETWEEN_TILES) // step_x, job.num_images)
    title = pictures.blank(width, 56)
    pictures.write(title, (0, 12), "Image sizes of the run", 22)
    rows, about, y = [title], [], top + title.height
    for stage in stages:
        row = pictures.blank(width, factor * stage.px + 24)
        pictures.write(row, (0, 0), f"{stage.px} px", 20)
        pictures.write(row, (0, 28), when(stage, job.recipe.data), 14, pictures.GREY)
        pictures.write(row, (0, 47), f"update {stage.update:,}", 14, pictures.GREY)
        found = examples_of(job._replace(step=stage.update, num_images=count), placement, None)
        for number, example in enumerate(found):
            tile = pictures.enlarged(example.pixels, factor)
            row.paste(tile, (STAGE_TEXT + number * step_x, 0))
        tiles = [[MARGIN + STAGE_TEXT + number * step_x, y] for number in range(len(found))]
        about.append({**stage._asdict(), "enlarged": factor, "tiles": tiles})
        rows.append(row)
        y += row.height
    return rows, about


def say(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()

"""A data set is the same with any number of parts, and after a kill at any moment."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forms
import numpy as np
import pytest
import torch
from conftest import CHECKOUT, TIMEOUT_S, environment, listed, photograph, run, shard
from crashes import dies_at
from PIL import Image
from shard_files import expected_samples, files_of
from sklearn.datasets import load_sample_images

from fasttrain import config, files, loaders, sharding, shards
from fasttrain.batch import Placement
from fasttrain.config import Optim, Train
from fasttrain.schedule import make_plan
from fasttrain.sharding import Build, Policy
from fasttrain.shards import ShardError, ShardWriter

CPU = Placement(torch.device("cpu"), half=False, threads=1)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)


# --------------------------------------------------------------------------------------------------
# How images are stored
# --------------------------------------------------------------------------------------------------


def test_short_side_shrinks_what_is_larger_in_train_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["python", "tools/make_shards.py", folder, out, "--short-side", "40"]
    run([*command, "--quality", "85"])
    policy = shards.read_manifest(out)["policy"]
    assert (policy["short_side"], policy["quality"], policy["resize_val"]) == (40, 85, False)
    for name in shards.SPLITS:
        originals = {p.read_bytes() for p in (folder / name).rglob("*.jpg")}
        sizes = []
        for _, stored in expected_samples(out, name):
            image = Image.open(io.BytesIO(stored))
            sizes.append(min(image.size))
            if name == "val" or stored in originals:
                assert stored in originals and (name == "val" or min(image.size) <= 40)
            else:
                assert min(image.size) == 40
        assert (max(sizes) > 40) == (name == "val")
    resized = shard(folder, tmp_path / "both", Policy(short_side=40, resize_val=True))
    assert resized and shards.open_split(tmp_path / "both", "val").width.min() > 0
    val = shards.open_split(tmp_path / "both", "val")
    assert np.minimum(val.width, val.height).max() == 40


@pytest.mark.parametrize("size", [(300, 200), (201, 900), (2000, 1500)])
def test_shrinking_keeps_the_picture_and_its_shape(size: tuple[int, int]) -> None:
    image = Image.fromarray(load_sample_images().images[0]).resize(size)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=95, subsampling=0)
    small = sharding.prepare_image(encoded.getvalue(), "train", Policy(short_side=64, quality=95))
    assert min(small.width, small.height) == 64
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.01)
    expected = image.resize((small.width, small.height), Image.Resampling.BICUBIC)
    assert np.abs(pixels_of(small.data) - np.asarray(expected, np.float32)).mean() < 5


def test_raw_images_are_pixels_and_can_be_trained_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw"
    shard(folder, out, Policy(short_side=40, store="raw"))
    split = shards.open_split(out, "train")
    assert split.store == "raw"
    for sample, (_, stored) in enumerate(expected_samples(out, "train")):
        width, height = int(split.width[sample]), int(split.height[sample])
        tail = np.frombuffer(stored[-3 * width * height :], np.uint8)
        assert stored.startswith(b"P6\n")
        assert (tail.reshape(height, width, 3) == pixels_of(stored)).all()
    settings = config.Data(root=out, crop_px=32)
    plan = make_plan(Train(epochs=5, global_batch_size=9), Optim(), 45, 1)
    batch = next(loaders.train_batches(split, settings, plan, 0, CPU, 0))
    assert batch.images.shape == (9, 3, 32, 32) and batch.images.std() > 0.1
    failed = run(
        ["python", "tools/make_shards.py", folder, tmp_path / "x", "--store", "raw"], code=2
    )
    assert "--store raw: needs --short-side" in failed.stderr


def test_a_recipe_can_ask_for_a_short_side(folder: Path, dataset: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "small", Policy(short_side=40))
    assert shards.open_split(tmp_path / "small", "train", short_side=40)
    for root, wanted in ((dataset, 40), (tmp_path / "small", 64)):
        with pytest.raises(ShardError, match=f"asks for images of short side {wanted}"):
            shards.open_split(root, "train", short_side=wanted)


def test_skipping_the_decoding_gives_the_same_bytes(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    shard(folder, tmp_path / "out", Policy(decode=False), shard_size=11)
    same = {k: v for k, v in files_of(dataset).items() if not k.startswith("manifest")}
    found = files_of(tmp_path / "out")
    assert {name: found[name] for name in same} == same


RAMP = np.linspace(0, 65_535, 64).astype(np.uint16)[None].repeat(48, 0)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def twelve_bit_tiff(values: np.ndarray) -> bytes:
    """A greyscale TIFF of 12 bits a pixel, which PIL reads but does not write."""
    height, width = values.shape
    first, second = values.reshape(-1, 2).T.astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, packed.size)]
    data = b"II*\0" + (8 + packed.size).to_bytes(4, "little") + packed.astype(np.uint8).tobytes()
    data += len(tags).to_bytes(2, "little")
    for tag, value in tags:
        data += b"".join(
            n.to_bytes(size, "little") for n, size in ((tag, 2), (4, 2), (1, 4), (value, 4))
        )
    return data + bytes(4)


def sixteen_bit_images() -> dict[str, bytes]:
    """The ramp from black to white in every format that holds 16 bits of grey."""
    ramp = Image.fromarray(RAMP)
    rgb = np.repeat(RAMP[..., None], 3, -1).astype(">u2").tobytes()
    return {
        "png": saved(ramp, "PNG"),
        "tiff": saved(ramp, "TIFF"),
        "big-endian tiff": saved(
            Image.frombytes("I;16B", ramp.size, RAMP.astype(">u2").tobytes()), "TIFF"
        ),
        "white is zero": saved(Image.fromarray(~RAMP), "TIFF", tiffinfo={262: 0}),
        "12-bit tiff": twelve_bit_tiff(RAMP >> 4),
        "pgm": b"P5 64 48 65535\n" + RAMP.astype(">u2").tobytes(),
        "rgb ppm": b"P6 64 48 65535\n" + rgb,
        "jpeg 2000": saved(ramp, "JPEG2000", irreversible=False),
    }


@pytest.mark.parametrize("kind", sixteen_bit_images())
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    data = sixteen_bit_images()[kind]
    for policy in (Policy(), Policy(short_side=48, store="raw")):
        image = sharding.prepare_image(data, "train", policy)
        expected = np.repeat((RAMP >> 8)[..., None], 3, -1)
        assert np.abs(pixels_of(image.data) - expected).max() <= 2
    assert image.repaired and (kind == "rgb ppm" or "scaled from 16 bits to 8" in image.repaired)
    small = sharding.prepare_image(data, "train", Policy(short_side=24))
    assert np.abs(pixels_of(small.data)[:, 4:-4] - (RAMP[0, 9:-8:2, None] >> 8)).max() < 6


def test_twelve_bits_in_sixteen_give_a_warning_of_dark_images() -> None:
    dark = sharding.prepare_image(saved(Image.fromarray(RAMP >> 4), "PNG"), "train", Policy())
    assert dark.repaired and "almost black now, as no value is above 4,095" in dark.repaired


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_in_the_alpha_channel_is_reported_as_lost(mode: str) -> None:
    """The RGB values of black drawings on a transparent ground are all black."""
    icon = Image.new("RGBA", (32, 32))
    icon.paste((0, 0, 0, 255), (8, 8, 24, 24))
    data = saved(icon.convert(mode), "PNG")
    for policy in (Policy(), Policy(short_side=16)):
        found = sharding.prepare_image(data, "train", policy).repaired
        assert found and "of one colour now, as its picture is in the transparency" in found
    icon.paste((200, 0, 0, 255), (8, 8, 24, 24))
    whole = sharding.prepare_image(saved(icon.convert(mode), "PNG"), "train", Policy()).repaired
    assert whole == f"PNG {mode}" or mode == "LA"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(RAMP.astype(np.float32) / 65_535), "TIFF F: .* floating-point numbers"),
        (Image.fromarray(RAMP.astype(np.int32)), "TIFF I: .* signed or 32-bit numbers"),
        (Image.new("LAB", (8, 8)), "TIFF LAB: has no RGB pixels; save it as an 8-bit RGB image"),
    ],
)
def test_images_of_other_bit_depths_are_rejected_by_name(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding.prepare_image(saved(image, "TIFF"), "train", Policy())


def test_strict_makes_a_rejected_image_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in shards.SPLITS:
        (tmp_path / "in" / split / "a").mkdir(parents=True)
        photograph(rng, 40, 40).save(tmp_path / "in" / split / "a" / "1.jpg")
    (tmp_path / "in" / "train" / "a" / "2.jpg").write_bytes(b"no image")
    command = ["python", "tools/make_shards.py", tmp_path / "in", tmp_path / "out", "--strict"]
    failed = run(command, code=2)
    assert "--strict: 1 images were rejected:\n  train/a/2.jpg: not an image" in failed.stderr
    assert not (tmp_path / "out" / shards.MANIFEST).exists()


# --------------------------------------------------------------------------------------------------
# Parts, and going on
# --------------------------------------------------------------------------------------------------


def test_parts_together_equal_one_run(folder: Path, dataset: Path, tmp_path: Path) -> None:
    for index in (3, 1, 2):
        manifest = shard(folder, tmp_path, shard_size=11, part=(index, 3))
        assert (manifest is None) == (index != 2)
        assert (tmp_path / shards.MANIFEST).exists() == (index == 2)
    assert files_of(tmp_path) == files_of(dataset)


def test_two_parts_on_the_command_line_make_the_whole(folder: Path, tmp_path: Path) -> None:
    command = ["python", "tools/make_shards.py", folder, tmp_path / "out", "--part"]
    first = run([*command, "1/2"])
    assert "finished when all other parts are done" in first.stderr
    assert json.loads(first.stdout)["part"] == "1/2" and not json.loads(first.stdout)["splits"]
    assert json.loads(run([*command, "2/2"]).stdout)["splits"]["train"]["samples"] == 45


def test_parts_made_at_the_same_time_equal_one_run(larger: Path, tmp_path: Path) -> None:
    script = BUILD.replace("workers=2", "part=(int(sys.argv[3]), 3)")
    command: list[str | Path] = ["python", "-c", script, larger, tmp_path / "parts"]
    parts = [
        subprocess.Popen([*command, str(part)], cwd=CHECKOUT, env=environment())
        for part in (1, 2, 3)
    ]
    assert [part.wait(TIMEOUT_S) for part in parts] == [0, 0, 0]
    shard(larger, tmp_path / "whole", shard_size=10)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


WRITE = ((ShardWriter, "_write"),)  # its bytes are buffered: no call of the file system


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_sharding_killed_at_any_file_system_call_gives_the_same_bytes(
    folder: Path, tmp_path: Path, every: int
) -> None:
    source = listed(folder)
    for listing in source.splits.values():  # a small build: 8 images in 3 shards
        listing.names = listing.names[:4]
        for column in ("labels", "container", "offset", "size", "mtime"):
            setattr(listing, column, getattr(listing, column)[:4])
    expected = tmp_path / "expected"
    sharding.write_dataset(source, expected, build=Build(shard_size=2))
    number = 1 - every
    died = True
    while died:
        number += every
        out = tmp_path / str(number)
        write = partial(sharding.write_dataset, source, out, build=Build(shard_size=2))
        died = dies_at(number, write, WRITE)
        if not (out / shards.MANIFEST).exists() or (out / sharding.UNFINISHED).exists():
            sharding.write_dataset(source, out, build=Build(shard_size=2))
        assert files_of(out) == files_of(expected), f"died at call {number}"
    assert number > 60


def test_sharding_killed_while_unpacking_gives_the_same_bytes(tmp_path: Path) -> None:
    """The source is unpacked first. The process is killed at every 20th call."""
    forms.write("hf-tar", tmp_path / "in", forms.photographs())

    def build(out: Path) -> None:
        shard(tmp_path / "in", out, shard_size=9)

    build(tmp_path / "expected")
    number, died = 1, True
    while died:
        out = tmp_path / str(number)
        died = dies_at(number, partial(build, out), WRITE)
        if not (out / shards.MANIFEST).exists() or (out / sharding.UNFINISHED).exists():
            build(out)
        assert files_of(out) == files_of(tmp_path / "expected"), f"died at call {number}"
        number += 20
    assert number > 60


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images: more than a second of work."""
    root = tmp_path_factory.mktemp("larger") / "in"
    rng = np.random.default_rng(0)
    image = photograph(rng, 200, 160)
    for split, count in (("train", 250), ("val", 50)):
        for number in range(count):
            path = root / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.rotate(number).save(path, quality=85)
    return root


def processes_of(group: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            yield int(path.parent.name)


BUILD = """
import sys
from pathlib import Path
from fasttrain import sharding, sources
root, out = map(Path, sys.argv[1:3])
sharding.write_dataset(
    sources.scan(root, "imagefolder", out, list, str), out,
    build=sharding.Build(shard_size=10, workers=2),
)
"""


@pytest.mark.slow
def test_sharding_killed_at_random_moments_gives_the_same_bytes(
    larger: Path, tmp_path: Path
) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command: list[str | Path] = ["python", "-c", BUILD, larger, out]
        return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), start_new_session=True)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait(TIMEOUT_S) == 0
    whole_s = time.monotonic() - begun
    expected = files_of(tmp_path / "whole")
    moments = random.Random(0)
    unfinished = 0
    for number in range(5):
        out = tmp_path / str(number)
        running = start(out)
        time.sleep(whole_s * moments.uniform(0.2, 0.95))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        while list(processes_of(running.pid)):
            time.sleep(0.01)
        if not (out / shards.MANIFEST).exists() or (out / sharding.UNFINISHED).exists():
            unfinished += 1
            shard(larger, out, shard_size=10)
        assert files_of(out) == expected
    assert unfinished >= 2


def test_a_full_disk_keeps_what_is_finished(
    folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full(self: ShardWriter, content: bytes) -> None:
        nonlocal written
        written += len(content)
        if written > 60_000:
            raise OSError(28, "No space left on device")
        write(self, content)

    write = ShardWriter._write
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(OSError, match="No space left on device"):
            shard(folder, tmp_path, shard_size=11)
    assert len(list(tmp_path.glob(f"*{sharding.PART}"))) >= 1 and not list(
        tmp_path.glob(f"*{files.TEMPORARY}")
    )
    shard(folder, tmp_path, shard_size=11)
    assert files_of(tmp_path) == files_of(dataset)


# --------------------------------------------------------------------------------------------------
# A source that is changed meanwhile
# --------------------------------------------------------------------------------------------------


def put_folder(root: Path, data: bytes, suffix: str = "jpg") -> Path:
    """An ImageFolder of one class: 6 times the same image to train on, twice to validate on."""
    for split, number in (("train", 6), ("val", 2)):
        (root / split / "cat").mkdir(parents=True, exist_ok=True)
        for name in range(number):
            (root / split / "cat" / f"{name}.{suffix}").write_bytes(data)
    return root


def put_tars(root: Path, data: bytes) -> Path:
    photos = [
        forms.Photo(split, forms.WNIDS[0], f"{number}.JPEG", data)
        for split, number in (("train", 0), ("train", 1), ("train", 2), ("val", 3))
    ]
    root.mkdir(exist_ok=True)
    forms.write_plain_webdataset(root, photos)
    return root


def put_parquet(root: Path, data: bytes) -> Path:
    photos = [
        forms.Photo(split, forms.WNIDS[0], f"{number}.JPEG", data)
        for split, number in (("train", 0), ("train", 1), ("train", 2), ("val", 3))
    ]
    shutil.rmtree(root, ignore_errors=True)
    forms.write("parquet", root, photos)
    return root


def bmp(colour: str) -> bytes:
    """Images that have the same size in bytes whatever they show."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "BMP")
    return data.getvalue()


@pytest.mark.parametrize("put", [put_folder, put_tars, put_parquet])
def test_parts_must_agree_on_the_files(put: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    """The content is replaced between two parts: same names, with other and with equal sizes."""
    root, out = tmp_path / "in", tmp_path / "out"
    shard(put(root, bmp("red")), out, shard_size=2, part=(1, 2))
    before = files_of(out)
    for image, what in (
        (bmp("blue"), "modification times"),
        (jpeg_of("blue"), "files or sizes"),
    ):
        put(root, image)
        message = rf"out was begun when the source had other {what} \(newest now: (train|val)/"
        with pytest.raises(ShardError, match=message):
            shard(root, out, shard_size=2, part=(2, 2))
    after = files_of(out)
    assert {name for name in before if name.endswith(".tar")}
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))


def jpeg_of(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "JPEG")
    return data.getvalue()


def test_a_file_that_changed_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    source = listed(put_folder(tmp_path / "in", bmp("red"), "bmp"))
    put_folder(tmp_path / "in", bmp("blue"), "bmp")
    with pytest.raises(ShardError, match=r"\d\.bmp was changed since it was listed"):
        sharding.write_dataset(source, tmp_path / "out")


def test_a_late_part_of_another_source_is_refused(tmp_path: Path) -> None:
    root, out = put_folder(tmp_path / "in", bmp("red")), tmp_path / "out"
    finished = shard(root, out)
    assert shard(root, out, part=(1, 2)) == finished
    put_folder(root, jpeg_of("blue"))
    with pytest.raises(ShardError, match="already holds a finished data set"):
        shard(root, out, part=(1, 2))


def test_more_archives_can_be_read_than_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "MAX_OPEN", 3)
    for number in range(9):
        image = jpeg_of(f"#0000{number}0")
        members = [("1.cls", b"0"), ("1.jpg", image)]
        (tmp_path / f"train-{number}.tar").write_bytes(forms.tar(members))
    (tmp_path / "val-0.tar").write_bytes(forms.tar(members))
    listing = listed(tmp_path).splits["train"]
    open_before = len(os.listdir("/proc/self/fd"))
    images = set()
    for _, _, found in sharding.read_images(listing):
        assert len(os.listdir("/proc/self/fd")) <= open_before + 3
        images.add(found)
    assert len(images) == 9
    assert len(os.listdir("/proc/self/fd")) == open_before

"""The kernel for raw images gives the CPU's pixels, in Triton's interpreter and on a GPU."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Interpreter, photograph
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from fasttrain import config, loaders, makers, shards
from fasttrain.batch import Batch, Placement
from fasttrain.config import Optim, Train
from fasttrain.reading import DataError
from fasttrain.resize import MEAN, STD, Resizer
from fasttrain.sampling import Augment, Draw
from fasttrain.schedule import make_plan
from fasttrain.shards import Split

CPU = Placement(torch.device("cpu"), half=False, threads=2)
Images = Sequence[NDArray[np.uint8]]


@pytest.fixture
def interpreted(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with its kernel run by Triton's interpreter, on tensors of the CPU."""
    module = interpreter("resize_gpu")
    # The interpreter's time is that of programs, not of values.
    monkeypatch.setattr(module, "TILE_ROWS", 32)
    monkeypatch.setattr(module, "TILE_VALUES", 128)
    return module


@pytest.fixture
def compiled(gpu: None) -> ModuleType:
    from fasttrain import resize_gpu

    return resize_gpu


def resized(
    kernel: ModuleType, images: Images, draw: Draw, cubic: bool, half: bool, device: str = "cpu"
) -> Tensor:
    """The kernel's result for whole images; in training, for the rows of their windows."""
    training = draw.windows.dtype == np.int32
    parts = [
        image[y : y + h] if training else image
        for image, (_, y, _, h) in zip(images, draw.windows, strict=True)
    ]
    head = np.zeros(len(images) * kernel.HEAD_BYTES, np.uint8)
    ends = len(head) + np.cumsum([part.size for part in parts])
    height, width = np.array([image.shape[:2] for image in images], np.uint16).T
    starts = ends - [part.size for part in parts]
    memory = np.concatenate([head, *(part.reshape(-1) for part in parts)])
    labels = np.zeros(len(images), np.uint16)
    kernel.write_head(kernel.head_of(memory, len(images)), draw, starts, (width, height), labels)
    there = torch.from_numpy(memory).to(device)
    return kernel.resize(there, len(images), draw.out_px, cubic, half).cpu()


def by_cpu(images: Images, draw: Draw, cubic: bool) -> Tensor:
    """The result of `Resizer` for the windows, which are whole pixels."""
    resizer = Resizer(2, "bicubic" if cubic else "bilinear")
    boxes = draw.windows.tolist()
    windows = [i[y : y + h, x : x + w] for i, (x, y, w, h) in zip(images, boxes, strict=True)]
    found = resizer.start(windows, draw.flips, draw.out_px).result()
    resizer.close()
    return found


def steps_apart(found: Tensor, expected: Tensor) -> Tensor:
    """Differences in steps of 1/255."""
    return (found.float() - expected.float()).abs() * (255 * torch.tensor(STD).view(3, 1, 1))


def check(found: Tensor, expected: Tensor, half: bool, most: float = 1.001) -> None:
    """Nearly all values differ by at most `most` steps of 1/255, and the others by one more."""
    assert found.dtype == (torch.float16 if half else torch.float32)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    apart = steps_apart(found, expected)
    most += 0.1 if half else 0  # a step is 0.017; above 2, float16 rounds to multiples of 0.002
    assert (apart > most).float().mean() < 1e-5 and apart.max() < most + 1
    assert apart.mean() < 0.3  # sums between two steps


def cases(seed: int, sizes: Sequence[tuple[int, int]], out_px: int) -> tuple[Images, Draw]:
    """Images of these widths and heights, and windows: any, whole, one pixel, one row."""
    rng = np.random.default_rng(seed)
    images = [np.asarray(photograph(rng, w, h)) for w, h in sizes]
    windows = []
    for number, (width, height) in enumerate(sizes):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        w, h = int(rng.integers(width - x)) + 1, int(rng.integers(height - y)) + 1
        windows.append([(x, y, w, h), (0, 0, width, height), (x, y, 1, 1), (0, y, width, 1)][
            number % 4
        ])  # fmt: skip
    flips = np.arange(len(sizes)) % 3 == 0
    return images, Draw(np.arange(len(sizes)), np.array(windows, np.int32), flips, out_px)


@pytest.mark.parametrize(("cubic", "half"), [(False, False), (False, True), (True, False)])
def test_training_pixels_are_the_cpus(interpreted: ModuleType, cubic: bool, half: bool) -> None:
    for out_px, sizes in ((32, [(90, 70), (40, 33), (50, 60), (30, 30)]), (72, [(31, 47)])):
        images, draw = cases(out_px, sizes, out_px)
        found, expected = (
            resized(interpreted, images, draw, cubic, half),
            by_cpu(images, draw, cubic),
        )
        check(found, expected, half, 2.001 if cubic else 1.001)  # torch's cubic is itself off PIL's


def test_tiles_of_the_size_on_a_gpu_give_the_same_pixels(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "TILE_ROWS", 8)
    monkeypatch.setattr(interpreted, "TILE_VALUES", 128)
    images, draw = cases(5, [(60, 50)], 45)
    check(resized(interpreted, images, draw, False, True), by_cpu(images, draw, False), True)


def test_erased_windows_have_the_mean_colour(interpreted: ModuleType) -> None:
    images, draw = cases(6, [(60, 50), (40, 50)], 40)
    windows = np.array([[3, 5, 20, 9], [0, 0, 0, 0]], np.float32)  # y, x, height, width
    erased = draw._replace(augment=Augment(erase=windows))
    before = resized(interpreted, images, draw, False, False)
    after = resized(interpreted, images, erased, False, False)
    before[0, :, 3:23, 5:14] = 0
    assert torch.equal(before, after)


def test_a_failing_kernel_gives_its_reason(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    assert not interpreted.fault(device, False, True)
    monkeypatch.setattr(interpreted, "resize", lambda *a: torch.zeros(1, 3, 8, 8))
    assert "white became [0.0, 0.0, 0.0]" in interpreted.fault(device, True, True)
    monkeypatch.delattr(interpreted, "resize")
    assert interpreted.fault(device, True, False).startswith("NameError: ")


# --------------------------------------------------------------------------------------------------
# The loaders
# --------------------------------------------------------------------------------------------------


def trained(split: Split, place: Placement, **settings: Any) -> Iterator[Batch]:
    chosen = config.Data.model_validate(
        {"root": split.root, "crop_px": 32, "queue_depth": 1, **settings}
    )
    plan = make_plan(Train(epochs=2, global_batch_size=5), Optim(), split.num_samples, 1)
    return loaders.train_batches(split, chosen, plan, 0, place, 0)


def evaluated(split: Split, place: Placement, **settings: Any) -> loaders.Loader:
    chosen = config.Data.model_validate(
        {"root": split.root, "eval_resize_px": 40, "eval_crop_px": 32, **settings}
    )
    return loaders.eval_loader(split, chosen, 5, 0, 1, place)


def check_evaluated(split: Split, batches: Sequence[Batch], half: bool) -> None:
    """Checks that each image comes once, as torchvision resizes and crops PIL's image."""
    tars = [path.read_bytes() for path in split.shard_paths]
    sample = 0
    for batch in batches:
        expected = []
        for label in batch.labels.tolist():
            width, height = int(split.width[sample]), int(split.height[sample])
            end = int(split.offset[sample]) + int(split.size[sample])
            pixels = tars[split.shard[sample]][end - 3 * width * height : end]
            image = TF.resize(Image.frombytes("RGB", (width, height), pixels), 40)
            expected.append(TF.normalize(TF.to_tensor(TF.center_crop(image, [32, 32])), MEAN, STD))
            assert label == split.label[sample]
            sample += 1
        check(batch.images.cpu(), torch.stack(expected), half)
    assert sample == split.num_samples


def same(ours: Sequence[Batch], theirs: Sequence[Batch], half: bool = False) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        check(one.images.cpu(), other.images.cpu(), half)
        assert torch.equal(one.labels.cpu(), other.labels.cpu())
        assert one.labels.dtype == torch.int64


@pytest.mark.parametrize("settings", [{}, {"read": "pread", "verify": "always"}])
def test_batches_are_the_cpu_loaders(
    raw: Path, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    train, val = (shards.open_split(raw, name) for name in shards.SPLITS)
    expected = list(islice(trained(train, CPU), 3))
    monkeypatch.setattr(makers, "kernel_works", lambda *arguments: True)
    same(list(islice(trained(train, CPU, **settings), 3)), expected)
    loader = evaluated(val, CPU, **settings)
    assert isinstance(loader.maker, makers.KernelMaker)
    check_evaluated(val, list(loader), False)


def test_a_damaged_sample_is_replaced_or_named(
    raw: Path, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    split = shards.open_split(Path(shutil.copytree(raw, tmp_path / "raw")), "train")
    second = next(islice(trained(split, CPU), 1, 2)).draw
    assert second
    bad = int(second.ids[2])
    path, offset = split.shard_paths[split.shard[bad]], int(split.offset[bad])
    tar = bytearray(path.read_bytes())
    tar[offset + 100] ^= 1
    path.write_bytes(tar)
    settings = {"verify": "always", "on_bad_sample": "replace"}
    expected = list(islice(trained(split, CPU, **settings), 3))
    monkeypatch.setattr(makers, "kernel_works", lambda *arguments: True)
    found = list(islice(trained(split, CPU, **settings), 3))
    same(found, expected)
    assert all(batch.draw and bad not in batch.draw.ids for batch in found)
    with pytest.raises(DataError, match=rf"sample {bad}, (.|\n)*its bytes changed"):
        list(trained(split, CPU, verify="always"))


def test_a_loader_without_a_consumer_ends(
    raw: Path, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(makers, "kernel_works", lambda *arguments: True)
    batches = trained(shards.open_split(raw, "train"), CPU)
    next(batches)
    batches.close()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------


def gpu_place(half: bool) -> Placement:
    return Placement(torch.device("cuda", 0), half=half, threads=4)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("out_px", [45, 128, 224])
def test_pixels_of_a_gpu_are_the_cpus(
    compiled: ModuleType, cubic: bool, half: bool, out_px: int
) -> None:
    sizes = [(341, 256), (256, 341), (500, 375), (300, 256)] * 4 + [(1200, 900), (20, 30)]
    images, draw = cases(out_px, sizes, out_px)
    found = resized(compiled, images, draw, cubic, half, "cuda")
    check(found, by_cpu(images, draw, cubic), half, 2.001 if cubic else 1.001)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("settings", [{}, {"read": "pread", "verify": "always"}])
def test_batches_of_a_gpu_are_the_cpu_loaders(
    raw: Path, compiled: ModuleType, half: bool, settings: Any
) -> None:
    train, val = (shards.open_split(raw, name) for name in shards.SPLITS)
    # Two sizes: the second epoch's images are larger.
    sizes = {"crop_px": ((0, 32), (1, 48))}
    place = gpu_place(half)
    same(list(trained(train, place, **settings, **sizes)), list(trained(train, CPU, **sizes)), half)
    loader = evaluated(val, place, **settings)
    assert isinstance(loader.maker, makers.KernelMaker)
    for _ in range(2):
        check_evaluated(val, list(loader), half)


@pytest.mark.gpu
def test_a_batch_that_is_used_late_is_not_overwritten(raw: Path, compiled: ModuleType) -> None:
    split = shards.open_split(raw, "train")
    expected = list(trained(split, CPU))
    kept, sums = [], []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number, batch in enumerate(trained(split, gpu_place(False))):
            torch.cuda._sleep(20_000_000)  # the device is some 10 ms behind the host
            sums.append(batch.images.double().sum())
            if number % 3 == 0:
                kept.append((number, batch))
    stream.synchronize()
    for number, batch in kept:
        check(batch.images.cpu(), expected[number].images, False)
    for found, batch in zip(sums, expected, strict=True):
        total = batch.images.double().sum().item()
        assert abs(found.item() - total) < 0.01 * batch.images.numel()
    for found, (_, batch) in zip(sums[::3], kept, strict=True):
        assert found.item() == batch.images.double().sum().item()


@pytest.mark.gpu
def test_a_host_that_is_ahead_of_the_device_has_few_batches_in_memory(
    raw: Path, compiled: ModuleType
) -> None:
    batches = trained(shards.open_split(raw, "train"), gpu_place(True), crop_px=224)
    torch.cuda.synchronize()

    def in_use() -> int:  # what is freed but waits for the device included
        return int(torch.cuda.memory_stats()["active_bytes.all.current"])

    before, most = in_use(), 0
    for _ in batches:
        torch.cuda._sleep(20_000_000)
        most = max(most, in_use() - before)
    one = 5 * 3 * 224 * 224 * 2
    assert most < (5 + 2) * one + 2e6  # of 18
    torch.cuda.synchronize()

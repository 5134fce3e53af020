"""On the CPU the loader gives the right pixels in the right order, and finds damaged bytes."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shard
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
import fasttrain
from fasttrain import config, loaders, pipeline, sampling, shards
from fasttrain.batch import Batch, Placement
from fasttrain.config import Optim, Train
from fasttrain.order import TrainingOrder
from fasttrain.reading import DataError
from fasttrain.schedule import Plan, make_plan
from fasttrain.shards import Split

CPU = Placement(torch.device("cpu"), half=False, threads=2)
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real photographs, 640 x 427, in colour and grey, upright and turned, as shards."""
    root = tmp_path_factory.mktemp("photos")
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for split in shards.SPLITS:
        for number in range(8):
            image = images[number % 2].resize((640 - 37 * number, 427 - 11 * number))
            if number % 4 == 2:
                image = image.convert("L")
            if number % 4 == 3:
                image = image.transpose(Image.Transpose.ROTATE_90)
            path = root / "folder" / split / "x" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[0x0112] = 6  # "turn me": ignored, as torchvision ignores it
            image.save(path, quality=90, subsampling=number % 3, exif=exif)
    shard(root / "folder", root / "shards")
    return root / "shards"


def original(split: Split, sample: int) -> Image.Image:
    tar = split.shard_paths[split.shard[sample]].read_bytes()
    offset, size = int(split.offset[sample]), int(split.size[sample])
    path = split.root / "sample.jpg"
    path.write_bytes(tar[offset : offset + size])
    return Image.open(path).convert("RGB")


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Undoes the usual normalisation of (B, 3, H, W): 0 to 255, as (B, H, W, 3)."""
    return (images.permute(0, 2, 3, 1) * STD + MEAN) * 255


def error_of(found: torch.Tensor, expected: Image.Image) -> tuple[float, float]:
    """The mean difference, and the largest one except at borders, in steps of 1/255."""
    difference = (found - torch.from_numpy(np.asarray(expected, np.float32))).abs()
    return difference.mean().item(), difference[1:-1, 1:-1].max().item()


def test_validation_pixels_are_torchvisions(photos: Path) -> None:
    split = shards.open_split(photos, "val")
    settings = config.Data(root=photos)
    (batch,) = loaders.eval_loader(split, settings, 8, 0, 1, CPU)
    for sample, found in enumerate(pixels(batch.images)):
        expected = v2.CenterCrop(224)(v2.Resize(256)(original(split, sample)))
        mean, largest = error_of(found, expected)
        assert mean < 0.25 and largest <= 2


def test_training_pixels_are_torchvisions(photos: Path) -> None:
    split = shards.open_split(photos, "train")
    plan = make_plan(Train(epochs=8, global_batch_size=8), Optim(), 8, 1)
    sides = set()
    for batch in loaders.train_batches(split, config.Data(root=photos), plan, 0, CPU, 0):
        assert batch.draw
        for sample, (x, y, w, h), flip, found in zip(
            *batch.draw[:3], pixels(batch.images), strict=True
        ):
            box = v2.functional.resized_crop(original(split, sample), y, x, h, w, [224, 224])
            mean, largest = error_of(found, v2.functional.hflip(box) if flip else box)
            assert mean < 0.25 and largest <= 2
            sides.add(bool(flip))
    assert sides == {True, False}


def loader_for(
    split: Split, world: int = 1, batch: int = 12, epochs: int = 5, **changes: object
) -> tuple[Plan, Callable[[int, int], list[Batch]]]:
    settings = config.Data(root=split.root, crop_px=40, eval_resize_px=48, eval_crop_px=40)
    plan = make_plan(
        Train(epochs=epochs, global_batch_size=batch, micro_batch_size=3), Optim(),
        split.num_samples, world,
    )  # fmt: skip
    return plan, lambda rank, step: list(
        loaders.train_batches(split, settings, plan, rank, CPU, step)
    )


def test_batches_have_the_documented_layout_and_dtypes(dataset: Path) -> None:
    split = shards.open_split(dataset, "train")
    plan, batches = loader_for(split)
    found = batches(0, 0)
    assert len(found) == plan.total_steps * plan.accumulation == 60
    for batch in found:
        assert batch.images.shape == (3, 3, 40, 40) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.shape == (3,) and batch.labels.dtype == torch.int64
        assert batch.draw and batch.labels.tolist() == split.label[batch.draw.ids].tolist()


def test_any_resume_point_gives_the_next_batch_bit_for_bit(dataset: Path) -> None:
    plan, batches = loader_for(shards.open_split(dataset, "train"))
    straight = batches(0, 0)
    for step in range(plan.total_steps):
        resumed = batches(0, step)
        expected = straight[step * plan.accumulation :]
        assert len(resumed) == len(expected)
        for a, b in zip(resumed, expected, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_processes_get_the_micro_batches_of_one(dataset: Path) -> None:
    split = shards.open_split(dataset, "train")
    _, one = loader_for(split)
    plan, two = loader_for(split, world=2)
    ranks = [two(rank, 0) for rank in range(2)]
    dealt = [ranks[r][m] for m in range(plan.total_steps * plan.accumulation) for r in range(2)]
    for a, b in zip(dealt, one(0, 0), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_evaluations_share_a_pipeline(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = shards.open_split(dataset, "val")
    settings = config.Data(root=dataset, eval_resize_px=40, eval_crop_px=32)
    forms = []

    def counted(form: pipeline.Form, *arguments: Any) -> Any:
        forms.append(form)
        return build(form, *arguments)

    build = pipeline.build
    monkeypatch.setattr(pipeline, "build", counted)
    loader = loaders.eval_loader(split, settings, 3, 0, 1, CPU)
    straight = list(loader)
    next(iter(loader))  # which breaks off, so that the pipeline is not used again
    for _ in range(3):
        again = list(loader)
        for a, b in zip(straight, again, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert len(forms) == 2
    height, width = forms[0].largest
    sizes = list(zip(split.height.tolist(), split.width.tolist(), strict=True))
    assert (height, width) in sizes and height * width == max(h * w for h, w in sizes)


def test_missing_dali_is_named_in_the_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fasttrain.pipeline")
    monkeypatch.delattr(fasttrain, "pipeline")
    split = shards.open_split(dataset, "val")
    with pytest.raises(DataError, match=r"DALI, which is not installed here .*nvidia-dali-cuda130"):
        list(loaders.eval_loader(split, config.Data(root=dataset), 3, 0, 1, CPU))


def test_ready_batches_are_not_measured(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = shards.open_split(dataset, "train")
    plan = make_plan(Train(epochs=50, global_batch_size=8), Optim(), split.num_samples, 1)
    asked: list[float] = []

    def batches(*_: Any, **__: Any) -> Iterator[Batch]:
        for number in range(100):
            asked.append(time.perf_counter())
            time.sleep(0 if number < 5 else 0.02)  # a queue of 2 and DALI's own were full
            yield Batch(torch.empty(0), torch.empty(8))

    monkeypatch.setattr(loaders, "Loader", batches)
    rate, _ = loaders.measure(split, config.Data(), plan, 0, CPU, seconds=0.2)
    assert 200 < rate <= 400 and len(asked) < 20


@pytest.mark.parametrize("world", range(1, 8))
def test_processes_share_the_validation_images(dataset: Path, world: int) -> None:
    split = shards.open_split(dataset, "val")
    settings = config.Data(root=dataset, eval_resize_px=40, eval_crop_px=32)
    ids: list[int] = []
    for rank in range(world):
        loader = loaders.eval_loader(split, settings, 2, rank, world, CPU)
        for _ in range(2 if world == 2 else 1):  # a second pass has all images again
            found = list(loader)
        for batch in found:
            assert batch.draw and len(batch.images) == len(batch.labels) == len(batch.draw.ids)
            assert batch.labels.tolist() == split.label[batch.draw.ids].tolist()
            ids += batch.draw.ids.tolist()
    assert sorted(ids) == list(range(13))


def test_leaving_early_leaves_no_thread(dataset: Path) -> None:
    split = shards.open_split(dataset, "train")
    plan, _ = loader_for(split)
    before = threading.active_count()
    batches = loaders.train_batches(split, config.Data(root=dataset), plan, 0, CPU, 0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("read", ["train", "val"])
def test_damaged_bytes_are_named(dataset: Path, tmp_path: Path, read: str) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "damaged"))
    split = shards.open_split(root, read)
    path, offset = split.shard_paths[split.shard[5]], int(split.offset[5])
    data_on_disk = bytearray(path.read_bytes())
    data_on_disk[offset : offset + int(split.size[5])] = bytes(int(split.size[5]))
    path.write_bytes(data_on_disk)
    with pytest.raises(DataError) as error:
        if read == "train":
            loader_for(split)[1](0, 0)
        else:
            list(loaders.eval_loader(split, config.Data(root=root), 4, 0, 1, CPU))
    assert f"{path}, key 000000005 at byte {offset}" in str(error.value)


def test_a_shard_that_shrank_is_named(dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "shrunk"))
    split = shards.open_split(root, "train")
    split.shard_paths[1].write_bytes(split.shard_paths[1].read_bytes()[:2048])
    with pytest.raises(DataError, match=r"train-000001.tar changed its size while in use"):
        loader_for(split)[1](0, 0)
    split.shard_paths[1].unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: No such file(.|\n)*verify_shards.py"):
        loader_for(split)[1](0, 0)


def damage(split: Split, *samples: int, whole: bool = True) -> None:
    """Sets half of the bytes of these images to 0; or so few that DALI still decodes them."""
    for sample in samples:
        path, size = split.shard_paths[split.shard[sample]], int(split.size[sample])
        tar = bytearray(path.read_bytes())
        start = int(split.offset[sample]) + (0 if whole else size * 2 // 3)
        number = size // 2 if whole else 40
        tar[start : start + number] = bytes(number)
        path.write_bytes(tar)


def batches_of(
    split: Split,
    world: int = 1,
    rank: int = 0,
    step: int = 0,
    warn: Callable[[str], object] = print,
    **settings: Any,
) -> list[Batch]:
    chosen = config.Data.model_validate({"root": split.root, "crop_px": 40, **settings})
    plan = make_plan(
        Train(epochs=3, global_batch_size=12, micro_batch_size=3), Optim(warmup_epochs=1),
        split.num_samples, world,
    )  # fmt: skip
    return list(loaders.Loader(TrainingOrder(split, chosen, plan, rank, step, warn), CPU))


@pytest.mark.parametrize("settings", [{}, {"color_jitter": (0.4, 0, 0, 0)}])
@pytest.mark.parametrize("store", ["dataset", "raw"])
def test_each_update_has_images_of_its_own_size(
    store: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    split = shards.open_split(request.getfixturevalue(store), "train")
    scales = {"scales_px": (32, 48, 64), **settings}
    found = batches_of(split, **scales)
    sides = [batch.images.shape[-1] for batch in found]
    assert sides == [batch.draw.out_px for batch in found if batch.draw]
    assert sides[::4] == sides[1::4] == sides[3::4] and {*sides} == {32, 48, 64}
    resumed = batches_of(split, step=5, **scales)
    for ours, theirs in zip(found[20:], resumed, strict=True):
        assert torch.equal(ours.images, theirs.images)
    constant = batches_of(split, **settings)  # the same windows, mirrored alike
    for ours, theirs in zip(found, constant, strict=True):
        assert ours.draw and theirs.draw
        assert (ours.draw.windows == theirs.draw.windows).all()


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_checksums_find_what_the_decoder_does_not(copied: Path, read: str) -> None:
    split = shards.open_split(copied, "train")
    damage(split, 5, whole=False)
    assert len(batches_of(split, read=read)) == 36
    for verify in ("first_epoch", "always"):
        with pytest.raises(DataError) as error:
            batches_of(split, read=read, verify=verify)
        assert "sample 5, " in str(error.value)
        assert "train-000000.tar, key 000000005 at byte" in str(error.value)
        assert f"python tools/verify_shards.py {copied}" in str(error.value)
    assert len(batches_of(split, read=read, verify="first_epoch", step=3)) == 24  # epoch 1 and on
    split = shards.open_split(copied, "val")
    damage(split, 5, whole=False)
    loader = loaders.eval_loader(
        split, config.Data(root=copied, verify="first_epoch"), 4, 0, 1, CPU
    )
    with pytest.raises(DataError, match=r"sample 5, (.|\n)*its bytes changed"):
        list(loader)
    assert len(list(loader)) == 4  # only the first evaluation


@pytest.mark.parametrize("settings", [{}, {"verify": "always"}, {"read": "pread"}, {"erase": 0.5}])
def test_a_damaged_sample_is_replaced_and_always_by_the_same(
    copied: Path, settings: dict[str, Any]
) -> None:
    split = shards.open_split(copied, "train")
    intact = batches_of(split, **settings)
    damage(split, 5, 17, 29)
    told: list[str] = []
    settings = settings | {"on_bad_sample": "replace"}
    straight = batches_of(split, warn=told.append, **settings)
    assert len(straight) == len(intact) == 36
    replaced = 0
    for before, after in zip(intact, straight, strict=True):
        assert before.draw and after.draw
        for place, (was, now) in enumerate(zip(before.draw.ids, after.draw.ids, strict=True)):
            if was in (5, 17, 29):
                replaced += 1
                assert now not in (5, 17, 29) and after.labels[place] == split.label[now]
            else:
                assert was == now and torch.equal(before.images[place], after.images[place])
    assert replaced >= 6 and [len(told), "".join(told).count("sample 5, ")] <= [3, 1]
    assert all(f"sample {number}, " in "".join(told) for number in (5, 17, 29))
    ranks = [batches_of(split, world=2, rank=rank, **settings) for rank in range(2)]
    dealt = [ranks[number % 2][number // 2] for number in range(36)]
    for found in (dealt, straight[:20] + batches_of(split, step=5, **settings)):
        for a, b in zip(straight, found, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_replacing_has_a_limit_and_ends_at_evaluations(copied: Path) -> None:
    split = shards.open_split(copied, "train")
    damage(split, 5, 17, 29)
    with pytest.raises(DataError, match="more than may be replaced") as error:
        batches_of(split, on_bad_sample="replace", max_bad_samples=2)
    assert all(f"sample {number}, " in str(error.value) for number in (5, 17, 29))
    assert len(batches_of(split, on_bad_sample="replace", max_bad_samples=3)) == 36
    damage(split, *range(45))
    with pytest.raises(DataError, match="more than may be replaced"):
        batches_of(split, on_bad_sample="replace")
    split = shards.open_split(copied, "val")
    damage(split, 5)
    settings = config.Data(root=copied, on_bad_sample="replace")
    with pytest.raises(DataError, match="sample 5, "):
        list(loaders.eval_loader(split, settings, 4, 0, 1, CPU))
    with pytest.raises(ValueError, match="max_bad_samples = 7: no sample is replaced"):
        config.Data(max_bad_samples=7)


LIES: dict[str, tuple[str, Callable[[Split], int]]] = {  # what an index may claim of sample 5
    "another's place": ("offset", lambda split: split.offset[6]),
    "a byte off": ("offset", lambda split: split.offset[5] + 1),
    "fewer bytes": ("size", lambda split: split.size[5] // 2),
    "another checksum": ("crc32", lambda split: split.crc32[5] ^ 1),
    "another shard": ("shard", lambda split: len(split.shard_paths) - 1),
    "another class": ("label", lambda split: (split.label[5] + 1) % 3),
    "wider": ("width", lambda split: 3 * split.width[5]),
    "narrower": ("width", lambda split: split.width[5] // 2),
    "far too wide": ("width", lambda split: 65535),
    "higher": ("height", lambda split: 3 * split.height[5]),
    "lower": ("height", lambda split: split.height[5] // 2),
}
UNSEEN = {  # what is not noticed when checksums are not compared
    "jpeg": {"another checksum", "another class"},
    "raw": {"another checksum", "another class", "another's place", "a byte off", "another shard"},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("store", ["jpeg", "raw"])
def test_an_index_that_does_not_fit_the_bytes_is_an_error(
    dataset: Path, raw: Path, store: str, name: str, lie: str
) -> None:
    split = shards.open_split(raw if store == "raw" else dataset, name)
    column, claim = LIES[lie]
    values = np.array(getattr(split, column))
    values[5] = claim(split)
    if values[5] == getattr(split, column)[5]:
        pytest.skip("there is one shard")
    changed: dict[str, Any] = {column: values}
    lying = replace(split, **changed)

    def number_of_batches(read: str, verify: str) -> int:
        # Every window: the whole image, so that DALI has to find all of it.
        chosen: dict[str, Any] = {"read": read, "verify": verify}
        chosen |= {"crop_area": (1.0, 1.0), "crop_ratio": (0.2, 5.0)}
        if name == "train":
            return len(batches_of(lying, **chosen))
        settings = config.Data.model_validate({"root": split.root, **chosen})
        return len(list(loaders.eval_loader(lying, settings, 4, 0, 1, CPU)))

    for read, verify in product(("mmap", "pread"), ("off", "always")):
        unseen = UNSEEN[store] | (
            {"narrower", "lower"} if (store, name) == ("jpeg", "train") else set()
        )
        if lie == "another class" or (verify == "off" and lie in unseen):
            assert number_of_batches(read, verify) == {"train": 36, "val": 4}[name]
        else:
            with pytest.raises(DataError, match="sample 5, ") as error:
                number_of_batches(read, verify)
            assert f"tools/verify_shards.py {split.root}" in str(error.value)


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_raw_images_are_verified_whole(raw: Path, tmp_path: Path, read: str) -> None:
    split = shards.open_split(Path(shutil.copytree(raw, tmp_path / "copied")), "train")
    intact = batches_of(split, read=read)
    for plain, verified in zip(intact, batches_of(split, read=read, verify="always"), strict=True):
        assert torch.equal(plain.images, verified.images)
    damage(split, 5)
    assert len(batches_of(split, read=read)) == 36
    with pytest.raises(DataError, match=r"sample 5, (.|\n)*its bytes changed"):
        batches_of(split, read=read, verify="always")
    for batch in batches_of(split, read=read, verify="always", on_bad_sample="replace"):
        assert batch.draw and 5 not in batch.draw.ids


def test_pixels_do_not_depend_on_the_batch_they_came_in(dataset: Path) -> None:
    split = shards.open_split(dataset, "val")
    settings = config.Data(root=dataset, eval_resize_px=40, eval_crop_px=32)
    images = [
        torch.cat([b.images for b in loaders.eval_loader(split, settings, size, 0, 1, CPU)])
        for size in (1, 5, 13)
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert sampling.num_eval_batches(13, 5, 0, 1) == 3

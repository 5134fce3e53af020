"""preview.py shows the pixels of the run's own loader, and the windows that it cuts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import preview
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from fasttrain import config, loaders, mixing, pictures, sampling, schedule, shards
from fasttrain.batch import Batch, Placement

CPU = Placement(torch.device("cpu"), half=False, threads=1)
Pixels = NDArray[np.uint8]


@pytest.fixture
def drawn(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Pixels, dict[str, Any], config.Recipe]]:
    """Draws a preview of a tiny recipe. Returns its pixels, its JSON object and the recipe."""

    def draw(*words: object, **changes: dict[str, Any]) -> tuple[Pixels, Any, config.Recipe]:
        recipe, out = tiny(**changes), tmp_path / "picture.png"
        capsys.readouterr()
        preview.main([str(recipe), str(out), *map(str, words)])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["picture"] == str(out)
        return np.asarray(Image.open(out)), found, config.load(recipe)

    return draw


def batches_of(recipe: config.Recipe, step: int, number: int = 1) -> list[Batch]:
    """The first micro-batches of an update, as a run of one process gets them."""
    split = shards.open_split(recipe.data.root, "train")
    plan = schedule.make_plan(recipe.train, recipe.optim, split.num_samples, 1)
    batches = loaders.train_batches(split, recipe.data, plan, 0, CPU, step)
    found = [next(batches) for _ in range(number)]
    batches.close()  # type: ignore[attr-defined]
    return found


def tile_at(picture: Pixels, corner: list[int], px: int, factor: int) -> Pixels:
    """An image of the picture, from which the enlargement is taken away."""
    x, y = corner
    shown = picture[y : y + factor * px, x : x + factor * px]
    tile = shown[::factor, ::factor]
    assert (tile.repeat(factor, 0).repeat(factor, 1) == shown).all()
    return tile


def frame_in(picture: Pixels, corner: list[int], side: int) -> tuple[int, int, int, int]:
    """The window that is drawn on an original: left, top, right and bottom, in its square."""
    x, y = corner
    rows, columns = np.nonzero((picture[y : y + side, x : x + side] == preview.FRAME).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_picture_has_the_pixels_of_the_loader_and_the_windows_of_the_samples(
    drawn: Callable[..., Any],
) -> None:
    picture, found, recipe = drawn("--update", 4)
    (batch,) = batches_of(recipe, 4)
    assert batch.draw and batch.draw.flips.any() and not batch.draw.flips.all()
    split, side = shards.open_split(recipe.data.root, "train"), found["enlarged"] * 32
    assert (found["update"], found["epoch"], found["px"]) == (4, 0, 32)
    assert len(found["images"]) == 8 and found["stages"] == []
    tiles = pictures.pixels(batch.images)
    for row, (shown, tile) in enumerate(zip(found["images"], tiles, strict=True)):
        sample, window = int(batch.draw.ids[row]), batch.draw.windows[row].tolist()
        assert (shown["sample"], shown["window"]) == (sample, window)
        assert shown["class"] == shown["labels"] == split.classes[split.label[sample]]
        assert (tile_at(picture, shown["tiles"][1], 32, found["enlarged"]) == tile).all()
        width, height = int(split.width[sample]), int(split.height[sample])
        scale = side / max(width, height)
        left, top = (side - round(width * scale)) // 2, (side - round(height * scale)) // 2
        x, y, w, h = window
        x_edges, y_edges = [x * scale + left, (x + w) * scale + left], [y * scale, (y + h) * scale]
        edges = x_edges[0], y_edges[0] + top, x_edges[1], y_edges[1] + top
        assert frame_in(picture, shown["tiles"][0], side) == pytest.approx(edges, abs=1)
        corner_x, corner_y = shown["tiles"][0]
        badge = picture[corner_y + side - 26 : corner_y + side - 6, corner_x + 6 : corner_x + 60]
        assert shown["mirrored"] == batch.draw.flips[row]
        assert ((badge == pictures.INK).all(2).mean() > 0.5) == shown["mirrored"]


def test_mixed_images_of_raw_shards_are_those_of_the_run(
    raw: Path, drawn: Callable[..., Any]
) -> None:
    """Two micro-batches of 4; of the second one 2 images are shown."""
    picture, found, recipe = drawn(
        "--images", 6, "--update", 1,
        data={"root": str(raw), "erase": 0.5, "color_jitter": (0.4, 0, 0, 0)},
        train={"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "micro_batch_size": 4},
    )  # fmt: skip
    split = shards.open_split(raw, "train")
    mix = mixing.build_mix(recipe.train, len(split.classes))
    assert mix
    shown = iter(found["images"])
    for group, batch in enumerate(batches_of(recipe, 1, 2)):
        images, labels = mixing.mix_at(mix, batch.images, batch.labels, (0, 1, group))
        plain, mixed = pictures.pixels(batch.images), pictures.pixels(images)
        for row in range(4 if group == 0 else 2):
            image = next(shown)
            for place, tiles in ((1, plain), (2, mixed)):
                tile = tile_at(picture, image["tiles"][place], 32, found["enlarged"])
                assert (tile == tiles[row]).all()
            expected = preview.describe_labels(labels[row].numpy(), split.classes)
            assert image["labels"] == expected and " % " in expected
    assert next(shown, None) is None


def test_each_stage_of_the_size_schedule_has_a_row(drawn: Callable[..., Any]) -> None:
    sizes = ((0, 32), (1, 40), (2, 96), (3, 128))  # the run ends before epoch 3
    picture, found, recipe = drawn("--images", 3, data={"crop_px": sizes})
    assert [(s["px"], s["first_epoch"], s["last_epoch"], s["update"]) for s in found["stages"]] == [
        (32, 0, 0, 0), (40, 1, 1, 5), (96, 2, 2, 10),
    ]  # fmt: skip
    for stage in found["stages"]:
        (batch,) = batches_of(recipe, stage["update"])
        assert len(stage["tiles"]) == 3 and stage["enlarged"] == 2
        for corner, tile in zip(stage["tiles"], pictures.pixels(batch.images), strict=False):
            assert (tile_at(picture, corner, stage["px"], 2) == tile).all()


def test_each_size_that_updates_draw_has_a_row(drawn: Callable[..., Any]) -> None:
    data = {"scales_px": (32, 64, 48)}
    picture, found, recipe = drawn("--images", 3, "--update", 5, data=data)
    split = shards.open_split(recipe.data.root, "train")
    plan = schedule.make_plan(recipe.train, recipe.optim, split.num_samples, 1)
    assert found["px"] == schedule.image_px(5, plan, recipe.data)
    first = schedule.first_updates(0, plan, recipe.data)
    assert [(s["px"], s["update"]) for s in found["stages"]] == [
        (px, first[px]) for px in (32, 64, 48)
    ]
    for stage in found["stages"]:
        (batch,) = batches_of(recipe, stage["update"])
        for corner, tile in zip(stage["tiles"], pictures.pixels(batch.images), strict=False):
            assert (tile_at(picture, corner, stage["px"], stage["enlarged"]) == tile).all()
    assert preview.when(preview.stages_of(recipe.data, plan)[0], recipe.data) == "1 of 3 updates"


def test_the_suffix_picks_the_format(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny()
    for name, kind in (("a.jpg", "JPEG"), ("b.WEBP", "WEBP")):
        preview.main([str(recipe), str(tmp_path / name), "--images", "2"])
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind and picture.width >= 900
    wide = pictures.blank(20_000, 1)
    with pytest.raises(config.ConfigError) as error:
        preview.save(wide, tmp_path / "c.webp")
    assert "the picture has 20,000 x 1 pixels, but WEBP allows 16,383 a side" in str(error.value)


def test_settings_and_changes_are_described() -> None:
    data = config.Data(augment="trivial", color_jitter=(0.4, 0.4, 0, 0), erase=0.25, flip=False)
    assert preview.describe_settings(data, config.Train(cutmix_alpha=1.0)) == (
        "Crop area 0.08 to 1, bilinear resizing, TrivialAugment, colour jitter 0.4, 0.4, 0, 0, "
        "erasing 0.25, CutMix 1."
    )
    operations = np.array([[[4, 9, 0], [12, 9, 0]]], np.int32)
    erase = np.array([[1, 2, 3, 4]], np.float32)
    changes = sampling.Augment(operations, np.ones((1, 4), np.float32), erase)
    assert preview.describe_changes(changes, 0) == "rotate, auto contrast, jitter, erased"
    assert preview.describe_changes(sampling.Augment(), 0) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["dataset", "raw"])
def test_a_picture_made_on_a_gpu_has_almost_the_pixels_of_the_cpu(
    gpu: None, store: str, request: pytest.FixtureRequest, drawn: Callable[..., Any]
) -> None:
    root = request.getfixturevalue(store)
    picture, found, recipe = drawn(data={"root": str(root)}, train={"precision": "bf16"})
    (batch,) = batches_of(recipe, 0)
    for shown, tile in zip(found["images"], pictures.pixels(batch.images), strict=True):
        on_gpu = tile_at(picture, shown["tiles"][1], 32, found["enlarged"])
        assert np.abs(on_gpu.astype(int) - tile).mean() < 3

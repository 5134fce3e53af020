"""Augmented images equal torchvision's, erasing works, and without settings nothing changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms import functional as TF
from torchvision.transforms.autoaugment import _apply_op

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from nvidia.dali import fn, pipeline_def, types

from fasttrain import augment, config, loaders, resize, sampling, shards
from fasttrain.batch import Batch, Placement
from fasttrain.config import Optim, Train
from fasttrain.sampling import Augment
from fasttrain.schedule import make_plan

PHOTO = load_sample_images().images[0][100:260, 180:372].copy()  # (160, 192, 3): a tower and sky
PHOTO[..., 2] = 20 + 0.8 * PHOTO[..., 2]  # so that there is contrast to gain
NAMES = tuple(augment.OPERATIONS)
CPU = Placement(torch.device("cpu"), half=False, threads=2)
SETTINGS = {
    "rand": config.Data(augment="rand", augment_ops=1),
    "trivial": config.Data(augment="trivial"),
}


@pipeline_def
def _changed(given: Augment, settings: config.Data, half: bool) -> tuple[Any, Any, Any]:
    """The photograph changed, the same normalised, and the same erased."""
    extra = augment.inputs(settings)
    rows = [column for column in given if column is not None]
    images, *columns = fn.external_source(
        lambda _: ([PHOTO] * len(rows[0]), *rows),
        num_outputs=1 + len(extra),
        batch=True,
        dtype=[types.UINT8] + [kind for kind, _ in extra.values()],
        ndim=[3] + [dimensions for _, dimensions in extra.values()],
        layout=["HWC"] + [""] * len(extra),
    )
    nodes = Augment(**{name: columns[place] for place, name in enumerate(extra)})
    images = augment.augment(images, nodes, settings)
    normal = fn.crop_mirror_normalize(
        images,
        mean=[100.5] * 3,
        std=[50.0] * 3,
        dtype=types.FLOAT,
        output_layout="HWC",
    )
    erased = augment.erase(normal, nodes, half)
    return images, fn.cast(normal, dtype=types.FLOAT16) if half else normal, erased


def changed(given: Augment, settings: config.Data, half: bool = False) -> list[np.ndarray]:
    number = len(next(column for column in given if column is not None))
    pipeline = _changed(
        given,
        settings,
        half,
        batch_size=number,
        num_threads=1,
        device_id=None,
        enable_conditionals=settings.augment != "none",
    )
    pipeline.build()
    return [np.array(output.as_tensor()) for output in pipeline.run()]


# --------------------------------------------------------------------------------------------------
# RandAugment and TrivialAugment
# --------------------------------------------------------------------------------------------------

TORCHVISION = {
    "translate_x": "TranslateX", "translate_y": "TranslateY", "shear_x": "ShearX",
    "shear_y": "ShearY", "rotate": "Rotate", "brightness": "Brightness", "contrast": "Contrast",
    "saturation": "Color", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "equalize": "Equalize", "auto_contrast": "AutoContrast",
    "identity": "Identity",
}  # fmt: skip
# Mean and largest difference in steps of 1/255, borders aside, over all magnitudes and signs. Most
# is DALI rounding where torchvision cuts off. Beyond that:
FAR = {
    "translate_x": (0, 0),
    "translate_y": (0, 0),
    "shear_x": (0.25, 128),  # more than 1 only along the line where the image meets FILL
    "shear_y": (0.25, 128),
    "rotate": (0.3, 128),
    "brightness": (0.6, 1),
    "contrast": (1.1, 2),
    "saturation": (1.2, 3),
    "sharpness": (0.6, 1),  # the border is sharpened as well
    "posterize": (0, 0),
    "solarize": (0, 0),
    "equalize": (1, 6),  # another rounding of the histogram's sum, OpenCV's
    "auto_contrast": (0.6, 1),
    "identity": (0, 0),
}
# Without 15, where torchvision's 16 pixels of TrivialAugment come out as 15.999999 and so as 15.
BINS = (0, 9, 16, 30)


@pytest.fixture(scope="module")
def by_operation() -> dict[tuple[str, str, int, int], np.ndarray]:
    """The photograph after every operation, by suite, operation, magnitude bin and sign."""
    rows = [(place, m, s) for place in range(len(NAMES)) for m in BINS for s in (0, 1)]
    found = {}
    for suite, settings in SETTINGS.items():
        images, _, _ = changed(Augment(np.array(rows, np.int32)[:, None]), settings)
        for (place, m, s), image in zip(rows, images, strict=True):
            found[suite, NAMES[place], m, s] = image
    return found


@pytest.mark.parametrize("suite", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_operations_give_torchvisions_pixels(
    by_operation: dict[tuple[str, str, int, int], np.ndarray], name: str, suite: str
) -> None:
    image = torch.from_numpy(PHOTO).permute(2, 0, 1).contiguous()
    if suite == "rand":
        space = RandAugment()._augmentation_space(31, PHOTO.shape[:2])
    else:
        space = TrivialAugmentWide()._augmentation_space(31)
    magnitudes, signed = space[TORCHVISION[name]]
    for bin_ in BINS:
        for negative in (0, 1):
            magnitude = float(magnitudes[bin_]) if magnitudes.ndim else 0.0
            # A positive shear leans the other way than torchvision's; the sign is drawn evenly.
            if signed and negative != name.startswith("shear"):
                magnitude = -magnitude
            expected = _apply_op(
                image, TORCHVISION[name], magnitude, InterpolationMode.BILINEAR, [augment.FILL] * 3
            )
            found = by_operation[suite, name, bin_, negative].astype(float)
            difference = np.abs(found - expected.permute(1, 2, 0).numpy())[1:-1, 1:-1]
            assert difference.mean() <= FAR[name][0] and difference.max() <= FAR[name][1]


def test_as_many_operations_are_applied_as_are_drawn() -> None:
    assert len(augment.OPERATIONS) == sampling.NUM_OPERATIONS
    assert augment.OPERATIONS.keys() == TORCHVISION.keys()


def test_operations_follow_one_another() -> None:
    shift, invert = (NAMES.index("translate_x"), 30, 0), (NAMES.index("solarize"), 30, 0)
    rows = np.array([[shift, invert], [invert, shift]], np.int32)
    images, _, _ = changed(Augment(rows), config.Data(augment="rand", augment_ops=2))
    edge = images[:, :, 0]
    assert (edge[0] == 255 - augment.FILL).all() and (edge[1] == augment.FILL).all()
    assert (images[0, :, -1] == images[1, :, -1]).all()


# --------------------------------------------------------------------------------------------------
# Colour jitter
# --------------------------------------------------------------------------------------------------


def jittered(*rows: tuple[float, float, float, float]) -> np.ndarray:
    settings = config.Data(color_jitter=(1, 1, 1, 0.5))
    return changed(Augment(jitter=np.array(rows, np.float32)), settings)[0].astype(float)


def test_jitter_of_one_kind_gives_torchvisions_pixels() -> None:
    image = torch.from_numpy(PHOTO).permute(2, 0, 1)

    def far(found: np.ndarray, expected: torch.Tensor) -> float:
        return np.abs(found - expected.permute(1, 2, 0).numpy()).max()

    for factor in (0.0, 0.6, 1.0, 1.4, 2.0):
        bright, contrast, saturated = jittered(
            (factor, 1, 1, 0), (1, factor, 1, 0), (1, 1, factor, 0)
        )
        assert far(bright, TF.adjust_brightness(image, factor)) <= 1
        assert far(saturated, TF.adjust_saturation(image, factor)) <= 3
        # About mid-grey, where torchvision takes the mean of the image in grey.
        about_grey = (PHOTO.astype(float) - 128) * factor + 128
        assert np.abs(contrast - about_grey.clip(0, 255)).max() <= 0.51


@pytest.mark.parametrize("turns", [-0.5, -0.25, -0.1, -0.05, 0.05, 0.1, 0.25])
def test_the_hue_turns_in_torchvisions_direction(turns: float) -> None:
    """The angles are about equal. DALI turns in YIQ, which keeps the luma; torchvision in HSV."""

    def hue(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels.astype(np.uint8)).convert("HSV"))[..., 0] / 255

    (found,) = jittered((1, 1, 1, 360 * turns))
    expected = TF.adjust_hue(torch.from_numpy(PHOTO).permute(2, 0, 1), turns).permute(1, 2, 0)
    off = (hue(found) - hue(expected.numpy()) + 0.5) % 1 - 0.5
    vivid = np.ptp(PHOTO, axis=2) > 80
    assert vivid.mean() > 0.05 and np.abs(off[vivid]).mean() < 0.05
    luma = (found - PHOTO) @ [0.299, 0.587, 0.114]
    assert np.abs(luma).mean() < 1


def test_jitter_changes_contrast_before_brightness() -> None:
    (found,) = jittered((1.5, 0.5, 1, 0))
    expected = ((PHOTO.astype(float) - 128) * 0.5 + 128) * 1.5
    assert np.abs(found - expected.clip(0, 255)).max() <= 0.51


# --------------------------------------------------------------------------------------------------
# Erasing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_erasing_sets_the_window_to_zero_and_changes_nothing_else(half: bool) -> None:
    windows = [(0, 0, 0, 0), (3, 5, 40, 60), (0, 0, 159, 191), (159, 191, 1, 1), (0, 0, 0, 0)]
    given = Augment(erase=np.array(windows, np.float32))
    _, before, after = changed(given, config.Data(erase=1.0), half)
    assert after.dtype == (np.float16 if half else np.float32)
    assert (before != 0).all()  # 100.5 is no pixel
    for (y, x, h, w), old, new in zip(windows, before, after, strict=True):
        inside = np.zeros(PHOTO.shape, bool)
        inside[y : y + h, x : x + w] = True
        assert (new[inside] == 0).all() and (new[~inside] == old[~inside]).all()


# --------------------------------------------------------------------------------------------------
# In the loader
# --------------------------------------------------------------------------------------------------

ALL: dict[str, Any] = {"augment": "rand", "color_jitter": (0.4, 0.4, 0.4, 0.1), "erase": 0.5}


def batches(root: Path, micro: int, first_step: int = 0, rank: int = 0, **changes: Any) -> list:
    split = shards.open_split(root, "train")
    train = Train(epochs=2, global_batch_size=12, micro_batch_size=micro)
    plan = make_plan(train, Optim(warmup_epochs=1), split.num_samples, 1)
    settings = config.Data(
        root=root, crop_px=40, eval_resize_px=48, eval_crop_px=40, **(ALL | changes)
    )
    return list(loaders.train_batches(split, settings, plan, rank, CPU, first_step))


def images_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("changes", [{}, {"augment": "trivial"}])
def test_pixels_depend_on_seed_epoch_and_sample_alone(dataset: Path, changes: dict) -> None:
    whole = images_of(batches(dataset, 12, **changes))
    assert len(whole) == 72
    assert torch.equal(images_of(batches(dataset, 3, **changes)), whole)
    assert torch.equal(images_of(batches(dataset, 6, first_step=4, **changes)), whole[48:])


def test_images_are_mirrored_before_they_are_erased(dataset: Path) -> None:
    plain = batches(dataset, 12, augment="none", color_jitter=(0, 0, 0, 0), erase=0.0)
    erased = batches(dataset, 12, augment="none", color_jitter=(0, 0, 0, 0))
    seen = set()
    for old, new in zip(plain, erased, strict=True):
        assert new.images.is_contiguous(memory_format=torch.channels_last)
        for row, flip in enumerate(new.draw.flips):
            y, x, h, w = new.draw.augment.erase[row].astype(int)
            expected = old.images[row].clone()
            expected[:, y : y + h, x : x + w] = 0
            # Without erasing, a CPU resizes outside DALI, which may round otherwise.
            assert (new.images[row] - expected).abs().max() < 2 / 255 / min(resize.STD)
            assert not new.images[row][:, y : y + h, x : x + w].any()
            seen.add((bool(flip), bool(h)))
    assert len(seen) == 4


def test_augmentation_that_is_off_adds_no_inputs() -> None:
    off = config.Data()
    assert augment.inputs(off) == {}
    assert sampling.augment_draw(0, 0, np.arange(4), off, 224) == Augment(None, None, None)
    node = object()  # comes back as it went in, so the pipeline has no other operators
    assert augment.augment(node, Augment(), off) is node
    assert augment.erase(node, Augment(), True) is node


@pytest.mark.parametrize("changes", [{"augment": "rand"}, {"color_jitter": (0, 0, 0, 0.1)}, ALL])
def test_graph_inputs_are_the_columns_that_are_drawn(changes: dict) -> None:
    settings = config.Data(**changes)
    drawn = sampling.augment_draw(0, 0, np.arange(4), settings, 224)._asdict()
    drawn = {name: column for name, column in drawn.items() if column is not None}
    numpy_types = {types.INT32: np.int32, types.FLOAT: np.float32}
    expected = augment.inputs(settings)
    assert list(drawn) == list(expected)
    for name, (kind, dimensions) in expected.items():
        assert drawn[name].dtype == numpy_types[kind] and drawn[name].ndim == dimensions + 1

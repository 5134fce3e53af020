"""A teacher's labels are read as they were written, and those of other images are refused."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import DEADLY, count_calls, in_a_child
from numpy.typing import NDArray

from fasttrain import config, teacher_labels
from fasttrain.schedule import Plan, make_plan
from fasttrain.shards import Split
from fasttrain.teacher_labels import Index, LabelsError, StoredLabels

VIEWS, TOP_K = 3, 2


def recipe_at(root: Path, **changes: dict[str, Any]) -> config.Recipe:
    sections: dict[str, dict[str, Any]] = {
        "data": {},
        "train": {"epochs": 9, "global_batch_size": 8},
        "distill": {"labels": root, "views": VIEWS},
    }
    for section, table in changes.items():
        sections[section] |= table
    return config.Recipe(
        data=config.Data(**sections["data"]),
        train=config.Train(**sections["train"]),
        distill=config.Distill(**sections["distill"]),
    )


def plan_of(recipe: config.Recipe, split: Split) -> Plan:
    return make_plan(recipe.train, recipe.optim, split.num_samples, 1, recipe.distill)


def made_up(view: int, num_samples: int, row: np.dtype[Any]) -> NDArray[Any]:
    """Rows that depend on view and sample."""
    rows = np.zeros(num_samples, row)
    sample = np.arange(num_samples)
    rows["ids"] = np.stack([sample % 3, (sample + 1 + view) % 3], 1)
    rows["probabilities"] = np.stack([0.5 + sample / 1000, 0.25 + view / 100 + 0 * sample], 1)
    return rows


def write(root: Path, recipe: config.Recipe, split: Split, views: int = VIEWS) -> Index:
    """Writes labels of some views, in files of a few samples."""
    root.mkdir(exist_ok=True)
    index = Index(
        version=teacher_labels.FORMAT_VERSION,
        subject=teacher_labels.subject_of(recipe, split, plan_of(recipe, split).draw_seed),
        teacher=teacher_labels.Teacher(name="runs/big", weights="0" * 12, px=None, precision="no"),
        top_k=TOP_K,
        num_samples=split.num_samples,
        part_samples=20,
        decoder="cpu",
        made_by="0.1.0",
        sha256=[],
    )
    teacher_labels.write_index(root, index)
    for view in range(views):
        rows = made_up(view, split.num_samples, index.row)
        for part in index.parts_of(view):
            teacher_labels.write_part(root, part, rows[part.first : part.last])
    found = [
        [teacher_labels.sha256_of(root, part, index.row) or "" for part in index.parts_of(view)]
        for view in range(views)
    ]
    index = index.model_copy(update={"sha256": found})
    teacher_labels.write_index(root, index)
    return index


@pytest.fixture
def root(tmp_path: Path, split: Split) -> Path:
    """A folder of labels for `split`."""
    write(tmp_path / "labels", recipe_at(tmp_path / "labels"), split)
    return tmp_path / "labels"


def opened(root: Path, split: Split, **changes: dict[str, Any]) -> StoredLabels:
    recipe = recipe_at(root, **changes)
    stored = teacher_labels.open_for(recipe, plan_of(recipe, split), split, True)
    assert stored
    return stored


def test_labels_are_read_by_view_and_sample(root: Path, split: Split) -> None:
    stored = opened(root, split)
    assert stored.about == (
        f"the 2 most probable classes of runs/big, from {root}; 3 views of 45 images"
    )
    ids = np.random.default_rng(0).permutation(45)[:17]
    for view in (2, 0, 1, 2):
        found = stored.take(view, ids)
        assert found.shape == (17, 2, TOP_K) and found.dtype == np.int16
        rows = made_up(view, 45, stored.row)[ids]
        assert np.array_equal(found[:, 0].view(np.uint16), rows["ids"])
        assert np.array_equal(found[:, 1].copy().view(np.float16), rows["probabilities"])
    assert len(stored.mapped) == teacher_labels.KEPT_VIEWS
    assert stored.row.itemsize == 4 * TOP_K  # bytes


def test_a_recipe_without_labels_opens_none(split: Split) -> None:
    recipe = config.Recipe(train=config.Train(global_batch_size=8))
    assert teacher_labels.open_for(recipe, plan_of(recipe, split), split, True) is None


CHANGES: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"data": {"crop_px": 192}}, "data.crop_px: 224 -> 192"),
    ({"data": {"crop_area": (0.25, 1.0)}}, "data.crop_area: [0.08, 1.0] -> [0.25, 1.0]"),
    ({"data": {"flip": False}}, "data.flip: true -> false"),
    ({"data": {"augment": "trivial"}}, 'data.augment: "none" -> "trivial"'),
    ({"train": {"seed": 4}}, "the seed of the draws: 0 -> 4"),
    ({"distill": {"draw_seed": 5}}, "the seed of the draws: 0 -> 5"),
]


@pytest.mark.parametrize(("changes", "line"), CHANGES)
def test_labels_of_other_images_are_refused(
    root: Path, split: Split, changes: dict[str, dict[str, Any]], line: str
) -> None:
    with pytest.raises(LabelsError) as error:
        opened(root, split, **changes)
    assert str(error.value) == (
        f"{root} holds labels of other images:\n  {line}\nuse the old values, or make labels for "
        "the new ones in another folder: python tools/label.py TEACHER RECIPE NEW_FOLDER"
    )


def test_each_setting_of_the_data_changes_pixels_or_does_not() -> None:
    """A new setting must be put into one of these lists."""
    others = {
        *("root", "short_side", "eval_resize_px", "eval_crop_px", "stage", "stage_part"),
        *("stage_keep", "shuffle", "shuffle_shards", "read", "read_ahead", "read_threads"),
        *("decode", "hw_decoder_load", "jpeg_fancy_upsampling", "verify", "on_bad_sample"),
        *("max_bad_samples", "threads", "queue_depth"),
        "scales_px",  # is refused with stored labels
    }
    assert others | {*teacher_labels.PIXELS} == config.Data.model_fields.keys()
    assert not others & {*teacher_labels.PIXELS}
    package = Path(teacher_labels.__file__).parent
    assert all((package / f"{name}.py").exists() for name in teacher_labels.CODE)


def test_settings_that_change_no_pixel_are_free(root: Path, split: Split) -> None:
    free: dict[str, dict[str, Any]] = {"data": {"read": "pread"}, "train": {"seed": 9}}
    stored = opened(root, split, **free, distill={"draw_seed": 0})
    assert stored.digest == opened(root, split, train={"epochs": 4}).digest
    assert stored.digest != opened(root, split, distill={"views": 2}).digest


def test_labels_of_another_data_set_are_refused(root: Path, split: Split) -> None:
    other = replace(split, digest="f" * 64, classes=("a", "b", "d"))
    with pytest.raises(LabelsError) as error:
        opened(root, other)
    assert f"the data set: {split.digest[:12]} -> {'f' * 12}" in str(error.value)
    assert "class 2 is c there and d here" in str(error.value)


def test_labels_of_another_code_need_consent(
    root: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = teacher_labels.read_index(root).subject.code
    monkeypatch.setattr(teacher_labels, "code_digest", lambda modules: "0123456789ab")
    with pytest.raises(LabelsError) as error:
        opened(root, split)
    assert str(error.value) == (
        f"{root} holds labels of images that another code has made: fasttrain 0.1.0 with the code "
        f"{old} of crops, flips and augmentations; here it is 0123456789ab\ninstall that version, "
        "or make the labels again; if you know that the images are the same: --set "
        "distill.other_code=true"
    )
    assert opened(root, split, distill={"other_code": True})


def test_missing_views_are_named(root: Path, split: Split) -> None:
    again = "run python tools/label.py again, which adds what is missing, or lower that number"
    for changes, needed, why in (
        ({"views": 4}, 4, "distill.views"),
        ({"views": 0}, 9, "one for each epoch"),
    ):
        with pytest.raises(LabelsError) as error:
            opened(root, split, distill=changes)
        assert str(error.value) == (
            f"{root} has the labels of 3 views, but this run needs {needed} ({why}): {again}"
        )


def no_index(root: Path) -> None:
    (root / "labels.json").unlink()


def half_an_index(root: Path) -> None:
    text = (root / "labels.json").read_text()
    (root / "labels.json").write_text(text[: len(text) // 2])


def newer_index(root: Path) -> None:
    path = root / "labels.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def no_part(root: Path) -> None:
    (root / "view-0001-part-002.labels").unlink()


def short_part(root: Path) -> None:
    path = root / "view-0001-part-002.labels"
    path.write_bytes(path.read_bytes()[:-1])


def flipped_bit(root: Path) -> None:
    path = root / "view-0001-part-002.labels"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


PART = "view-0001-part-002.labels is missing or damaged; restore it from a copy, or remove it and "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_index, "holds no labels of a teacher (labels.json: No such file or directory); make"),
        (half_an_index, "labels.json is damaged; restore it, or make the labels again"),
        (newer_index, "labels.json has format version 2, but this fasttrain reads 1; make the"),
        (no_part, PART),
        (short_part, PART),
        (flipped_bit, PART),
    ],
)
def test_damage_is_found_before_the_run(
    root: Path, split: Split, damage: Callable[[Path], None], message: str
) -> None:
    damage(root)
    with pytest.raises(LabelsError) as error:
        opened(root, split)
    assert str(error.value).startswith(str(root)) and message in str(error.value)


def test_a_file_that_shrinks_during_the_run_is_an_error(root: Path, split: Split) -> None:
    stored = opened(root, split)
    short_part(root)
    with pytest.raises(LabelsError, match="part-002"):
        stored.take(1, np.arange(4))


def test_a_writer_killed_at_any_call_leaves_whole_files(tmp_path: Path, split: Split) -> None:
    recipe = recipe_at(tmp_path / "labels")
    whole = write(tmp_path / "whole", recipe, split, views=1)

    def work(at: int, root: Path) -> int:
        calls = count_calls(at, lambda: os.kill(os.getpid(), signal.SIGKILL), DEADLY)
        write(root, recipe, split, views=1)
        return 7 if len(calls) <= at else 0

    for at in range(0, 200):
        root = tmp_path / str(at)
        root.mkdir()
        ended = in_a_child(partial(work, at, root)) == 7
        if (root / "labels.json").exists():
            found = teacher_labels.read_index(root)
            assert found.sha256 in ([], whole.sha256)
        for path in root.glob("*.labels"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        if ended:
            break
    assert ended and at > 15

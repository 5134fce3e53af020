"""What label.py stores is what the teacher says about the images that the run sees."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import label
import numpy as np
import pytest
import teachers
import torch
import torchvision
from accelerate import Accelerator
from conftest import STEP, Refused, lines, run, write_recipe
from runs import ALL, launch, result_of
from test_resuming import StopAfter, stop_after  # noqa: F401  (a fixture)

from fasttrain import (
    config,
    distilling,
    loaders,
    makers,
    schedule,
    session,
    shards,
    teacher_labels,
    train,
    weights,
)
from fasttrain.batch import Placement
from fasttrain.order import TrainingOrder
from fasttrain.shards import Split

VIEWS = 2
DATA = {key: value for key, value in ALL["data"].items() if key != "scales_px"}
DISTILL = {"views": VIEWS, "draw_seed": 5, "weight": 0.7, "temperature": 2.0}
CPU = Placement(torch.device("cpu"), False, 1)


def labelled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> dict[str, Any]:
    """Runs label.py in this process; returns its result."""
    monkeypatch.setattr(sys, "argv", ["label.py", *map(str, words)])
    label.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def stored(
    dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder of labels that the network of `trained` gave, in files of 20 images."""
    root = tmp_path_factory.mktemp("labelled")
    out = root / "labels"
    changes = student(labels=str(out))
    recipe = write_recipe(root / "student.toml", dataset, root / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_labels, "PART_SAMPLES", 20)
        # The recipe names the folder.
        patch.setattr(sys, "argv", ["label.py", str(trained), str(recipe), "--batch-size=8"])
        label.main()
    yield out


def student(**distill: Any) -> dict[str, dict[str, Any]]:
    """The changes of TINY for a student, with everything that draws random numbers."""
    return ALL | {"data": DATA, "distill": DISTILL | distill, "checkpoint": {"every_steps": 4}}


def test_what_is_stored_is_what_the_teacher_says_in_the_run(
    stored: Path, trained: Path, split: Split, dataset: Path, tmp_path: Path
) -> None:
    recipe = config.load(
        write_recipe(tmp_path / "a.toml", dataset, tmp_path, **student(labels=str(stored)))
    )
    plan = schedule.make_plan(recipe.train, recipe.optim, split.num_samples, 1, recipe.distill)
    found = teacher_labels.open_for(recipe, plan, split, True)
    teacher = session.read_teacher(
        recipe.model_copy(update={"distill": config.Distill(teacher=trained)}), split.classes
    )
    assert found and teacher
    live = distilling.from_teacher(teacher, Accelerator(cpu=True), 1.0)
    from_stored = distilling.from_stored(3, 1.0)
    order = TrainingOrder(split, recipe.data, replace(plan, total_steps=15), 0)
    views = set()
    for batch in loaders.Loader(order, CPU, stored=found):
        assert batch.draw
        views.add(batch.draw.view)
        torch.testing.assert_close(from_stored(batch), live(batch), rtol=0, atol=1e-3)
    assert views == {0, 1}
    index = teacher_labels.read_index(stored)
    assert index.teacher.name == str(trained / STEP / "model.safetensors")
    assert len({path.name for path in stored.glob("*.labels")}) == 3 * VIEWS


class Numbers:
    """Stands in for stored labels: they name view and samples."""

    def take(self, view: int, ids: np.ndarray) -> np.ndarray:
        return np.stack([np.full(len(ids), view), ids], 1).astype(np.int16)[:, :, None]


@pytest.mark.parametrize("kind", ["windows", "dali", "kernel"])
def test_each_maker_hands_the_labels_of_its_images_over(
    kind: str, split: Split, raw: Path, interpreter: Callable[[str], Any]
) -> None:
    chosen = split
    data = config.Data(crop_px=32, augment="trivial" if kind == "dali" else "none")
    if kind == "kernel":
        interpreter("resize_gpu")
        chosen = shards.open_split(raw, "train")
    # Triton's interpreter takes a second for an image.
    few = kind == "kernel"
    settings = config.Train(
        epochs=3, global_batch_size=2 if few else 15, max_steps=1 if few else None
    )
    distill = config.Distill(views=VIEWS)
    plan = schedule.make_plan(settings, config.Optim(), 45, 1, distill)
    order = TrainingOrder(chosen, data, plan, 0)
    stored: Any = Numbers()
    if few:
        loader = loaders.Loader(order, CPU)
        loader.maker = makers.KernelMaker(order, CPU, stored)
    else:
        loader = loaders.Loader(order, CPU, stored=stored)
    views = []
    for batch in loader:
        assert batch.draw and batch.soft is not None
        view, ids = batch.soft.squeeze(2).T.tolist()
        assert ids == batch.draw.ids.tolist()
        assert batch.labels.tolist() == chosen.label[batch.draw.ids].tolist()
        views.append(set(view))
    assert views == ([{0}] if few else [{0}] * 3 + [{1}] * 3 + [{0}] * 3)


def test_only_missing_and_damaged_files_are_made_again(
    stored: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_labels, "PART_SAMPLES", 20)
    root = shutil.copytree(stored, tmp_path / "labels")
    lost, damaged, kept = sorted(root.glob("*.labels"))[1:4]
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[::-1])
    (root / "x.fasttrain.tmp").touch()  # a write that was killed
    time = kept.stat().st_mtime_ns
    result = labelled(capsys, monkeypatch, trained, stored.parent / "student.toml", root)
    assert result["views"] == VIEWS and result["images"] == 20 + 5
    assert kept.stat().st_mtime_ns == time
    assert not (root / "x.fasttrain.tmp").exists()
    rows = {path: np.frombuffer(path.read_bytes()[:-32], "<u2") for path in (lost, damaged)}
    for path, found in rows.items():
        expected = np.frombuffer((stored / path.name).read_bytes()[:-32], "<u2")
        assert np.array_equal(found, expected)
    more = ("--set", "distill.views=3")
    result = labelled(capsys, monkeypatch, trained, stored.parent / "student.toml", root, *more)
    assert result["images"] == 45 and len(teacher_labels.read_index(root).sha256) == 3
    result = labelled(capsys, monkeypatch, trained, stored.parent / "student.toml", root, *more)
    assert result["images"] == 0


@pytest.mark.slow
def test_two_processes_make_the_labels_of_one(stored: Path, trained: Path, tmp_path: Path) -> None:
    words = [trained, stored.parent / "student.toml", tmp_path / "labels", "--batch-size", "8"]
    run([*launch(2), "tools/label.py", *words], ACCELERATE_USE_CPU="1")
    one = teacher_labels.read_index(stored)
    two = teacher_labels.read_index(tmp_path / "labels")
    assert two.subject == one.subject and two.teacher == one.teacher
    for view in range(VIEWS):
        whole = [
            np.concatenate(
                [
                    np.frombuffer((root / part.name).read_bytes()[:-32], index.row)
                    for part in index.parts_of(view)
                ]
            )
            for root, index in ((stored, one), (tmp_path / "labels", two))
        ]
        for name in ("ids", "probabilities"):
            assert np.allclose(whole[0][name], whole[1][name], atol=1e-3)


def test_a_run_with_stored_labels_resumes_bit_for_bit(
    stored: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    stop_after: type[StopAfter],  # noqa: F811
) -> None:
    changes = student(labels=str(stored))
    changes["train"] = changes["train"] | {"max_steps": 8}
    straight = tiny("straight", **changes | {"log": {"run_dir": str(tmp_path / "straight")}})
    train.main([str(straight)])
    recipe = str(tiny(**changes))
    stop_after.asked = 8  # in the evaluation of the first epoch
    with pytest.raises(SystemExit):
        train.main([recipe])
    stop_after.asked = sys.maxsize
    train.main([recipe])
    tensors, _ = result_of(tmp_path / "run")
    for name, tensor in result_of(tmp_path / "straight")[0].items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.slow
def test_two_processes_learn_from_the_labels_of_one(
    stored: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    losses = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        changes = student(labels=str(stored)) | {
            "train": {"micro_batch_size": 4, "max_steps": 7, "cutmix_alpha": 1.0},
            "log": {"every_steps": 1, "run_dir": str(folder)},
        }
        run([*launch(world), "fasttrain/train.py", tiny(**changes)], ACCELERATE_USE_CPU="1")
        losses[world] = [record["loss"] for record in lines(folder / "metrics.jsonl", "train")]
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_a_teacher_in_the_run_trains_as_its_stored_labels_do(
    stored: Path, trained: Path, tiny: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    losses = {}
    for key, path in (("labels", stored), ("teacher", trained)):
        table = {"max_steps": 5, "label_smoothing": 0.1}
        changes = {
            "train": table,
            "distill": DISTILL | {key: str(path)},
            "log": {"every_steps": 1, "run_dir": str(tmp_path / key)},
            "data": DATA,
        }
        recipe = tiny(key, **changes)
        train.main([str(recipe)])
        losses[key] = [
            record["loss"] for record in lines(tmp_path / key / "metrics.jsonl", "train")
        ]
    assert losses["teacher"] == pytest.approx(losses["labels"], rel=2e-3)
    # A run that learned from labels does not go on with others, nor without.
    run_dir = f"log.run_dir={tmp_path / 'labels'}"
    words = [tmp_path / "labels.toml", "--set", run_dir, "--set", "train.max_steps=9"]
    other = shutil.copytree(stored, tmp_path / "other")
    index = teacher_labels.read_index(other)
    changed = index.subject, index.top_k
    part = index.parts_of(1)[0]
    rows = np.frombuffer((other / part.name).read_bytes()[:-32], index.row).copy()
    rows["probabilities"] = 0
    teacher_labels.write_part(other, part, rows)
    index.sha256[1][0] = teacher_labels.sha256_of(other, part, index.row) or ""
    teacher_labels.write_index(other, index)
    assert changed == (index.subject, index.top_k)
    refused(
        train.main,
        [*words, "--set", f"distill.labels={other}"],
        "distill.labels: the teacher's labels have another digest: ",
        "use the old values, or another folder with --set log.run_dir=...",
    )


def test_faults_of_the_command_are_told_before_the_work(
    stored: Path,
    trained: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = stored.parent / "student.toml"
    file = trained / STEP / "model.safetensors"
    shutil.copy(file, tmp_path / "weights.safetensors")
    empty = tmp_path / "new"
    full = tmp_path / "full"
    full.mkdir()
    (full / "photo.jpg").touch()
    cases: list[tuple[list[object], str]] = [
        (["nothing", recipe, empty], "nothing: there is no such file or folder; name a run folder"),
        ([trained, "demo"], "OUT is missing: name a folder, or set [distill] labels in the recipe"),
        ([trained, tmp_path / "no.toml", empty], "cannot read this recipe"),
        ([trained, recipe, empty, "--set", "train.epoch=3"], "did you mean epochs?"),
        (
            [tmp_path / "weights.safetensors", recipe, empty],
            "is a file of weights that does not describe its network: give its recipe, such as --t",
        ),
        (
            [trained, recipe, empty, "--teacher-weights", file],
            "--teacher-weights: is for torchvision:NAME and timm:NAME; leave it out for",
        ),
        (
            ["torchvision:resnet50", recipe, empty, "--ema"],
            "--ema: is for networks of fasttrain; leave it out for torchvision:resnet50",
        ),
        (
            ["torchvision:resnet51", recipe, empty],
            "torchvision:resnet51: there is no such network; did you mean resnet50",
        ),
        ([trained, recipe, full], f"{full} holds other files (photo.jpg); choose an empty folder"),
        (
            [trained, recipe, stored, "--top-k", "2", "--set", "data.flip=false"],
            f"{stored} holds other labels:\n  data.flip: true -> false\n  --top-k: 3 -> 2\n"
            "use the old values, or another folder",
        ),
        ([trained, recipe, empty, "--precision", "fp16"], "--precision fp16: needs a GPU"),
    ]
    for words, message in cases:
        refused(label.main, words, message)
    monkeypatch.setitem(sys.modules, "timm", None)
    words = ["timm:resnet50", recipe, empty]
    refused(label.main, words, "timm is not installed; pip install -e '.[distill]'")


def test_networks_of_torchvision_get_their_own_size_and_classes(
    split: Split, tmp_path: Path, refused: Refused
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("c\nx\nb\na\n")
    module = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=4)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    wanted = teachers.Wanted("torchvision:shufflenet_v2_x0_5", tmp_path / "w.pth", names, 48)
    teacher = teachers.foreign_teacher(wanted, config.Recipe(), split.classes)
    images = torch.randn(2, 3, 32, 32)
    larger = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = module.eval()(larger)[:, [3, 2, 0]]
        torch.testing.assert_close(teacher.module(images), expected)
    assert teacher.digest == weights.Weights(Path(), dict(module.state_dict())).digest()
    with pytest.raises(config.ConfigError) as error:
        teachers.foreign_teacher(replace(wanted, name="torchvision:resnet18"), config.Recipe(), ())
    assert "--teacher-weights" in str(error.value) and "another network" in str(error.value)


def test_a_teacher_normalises_images_by_its_own_statistics() -> None:
    module = torch.nn.Flatten()
    halves = teachers.Adapted(teachers.Foreign(module, [0.5] * 3, [0.5] * 3), None, "bilinear")
    ours = teachers.Adapted(teachers.Foreign(module), None, "bilinear")
    pixels = torch.rand(2, 3, 4, 4)
    from fasttrain.resize import MEAN, STD

    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    images = (pixels - mean) / std
    torch.testing.assert_close(halves(images), ((pixels - 0.5) / 0.5).flatten(1))
    assert torch.equal(ours(images), images.flatten(1))


def test_a_live_teacher_must_be_a_run_of_ours(
    trained: Path, tiny: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "weights.safetensors"
    shutil.copy(trained / STEP / "model.safetensors", file)
    refused(
        train.main,
        [tiny(distill={"teacher": str(file)})],
        f'[distill] teacher = "{file}": is a file of weights that does not describe its network; ',
    )
    refused(
        train.main,
        [tiny(distill={"teacher": "nothing"})],
        '[distill] teacher = "nothing": there is no such file or folder; name a run folder, a ',
    )
    refused(
        train.main,
        [tiny(distill={"labels": str(tmp_path / "none")})],
        f"{tmp_path / 'none'} holds no labels of a teacher (labels.json: No such file or dir",
    )

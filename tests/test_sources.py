"""Every form of source gives the same data set, and a faulty source gives a message."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import forms
import numpy as np
import pytest
import torch
from conftest import listed, run, shard
from forms import FORMS, WNIDS, Photo
from PIL import Image
from shard_files import expected_samples, files_of

from fasttrain import config, loaders, resize, shards, sources
from fasttrain.batch import Placement
from fasttrain.shards import ShardError

NAMED = [form for form in FORMS if form not in ("parquet-nopath", "webdataset-plain")]
CPU = Placement(torch.device("cpu"), half=False, threads=1)


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    return forms.photographs()


@pytest.fixture(scope="module")
def made(photos: list[Photo], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set of every form."""
    root = tmp_path_factory.mktemp("forms")
    found = {}
    for form in FORMS:
        forms.write(form, root / form, photos)
        shard(root / form, root / f"{form}-shards", shard_size=7)
        found[form] = root / f"{form}-shards"
    return found


def as_one(root: Path) -> tuple[dict[str, str], dict]:
    """Digests of the files, and the manifest less the name of the form and what was passed by."""
    files = {k: v for k, v in files_of(root).items() if not k.startswith("manifest")}
    manifest = shards.read_manifest(root)
    return files, {
        k: v for k, v in manifest.items() if k not in ("form", "ignored_files", "archives")
    }


@pytest.mark.parametrize("form", NAMED)
def test_every_form_gives_the_same_bytes(made: dict[str, Path], form: str) -> None:
    assert as_one(made[form]) == as_one(made["imagefolder"])


@pytest.mark.parametrize("form", FORMS)
def test_labels_and_counts_equal_those_of_the_source(
    made: dict[str, Path], photos: list[Photo], form: str
) -> None:
    root = made[form]
    manifest = shards.read_manifest(root)
    assert manifest["form"] == {"parquet-nopath": "parquet", "webdataset-plain": "webdataset"}.get(
        form, form.partition("-")[0] if form.startswith("imagefolder") else form
    )
    repaired = {Path(i["name"]).name for i in manifest["splits"]["train"]["repaired"]}
    if form in NAMED:
        assert manifest["classes"] == list(WNIDS)
        assert repaired == {forms.ODD["cmyk"], forms.ODD["png"]}
    assert len(repaired) == 2 and not manifest["splits"]["train"]["rejected"]
    for name in shards.SPLITS:
        expected = {p.data: p.label for p in photos if p.split == name}
        found = expected_samples(root, name)
        assert len(found) == len(expected) == {"train": 18, "val": 9}[name]
        kept = [(label, image) for label, image in found if image in expected]
        assert all(expected[image] == label for label, image in kept)
        assert len(found) - len(kept) == (2 if name == "train" else 0)
        labels = sorted(label for label, _ in found)
        assert labels == sorted(expected.values())


def test_odd_images_come_out_as_pil_sees_them(made: dict[str, Path], photos: list[Photo]) -> None:
    """CMYK, PNG, grey, progressive, ICC and EXIF, through the training pipeline's decoder."""
    root = made["imagefolder"]
    split = shards.open_split(root, "train")
    settings = config.Data(root=root, eval_resize_px=32, eval_crop_px=32)
    images = torch.cat([b.images for b in loaders.eval_loader(split, settings, 5, 0, 1, CPU)])
    mean, std = torch.tensor(resize.MEAN), torch.tensor(resize.STD)
    pixels = (images.permute(0, 2, 3, 1) * std + mean) * 255
    by_bytes = {p.data: p for p in photos}
    odd = 0
    for (_, stored), found in zip(expected_samples(root, "train"), pixels, strict=True):
        photo = by_bytes.get(stored)
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        short, long = min(image.size), max(image.size)
        width, height = (32 if side == short else 32 * long // short for side in image.size)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        expected = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float32)
        difference = (found - torch.from_numpy(expected)).abs()
        assert difference.mean() < 0.3 and difference[1:-1, 1:-1].max() <= 2
        odd += photo is None or photo.name in forms.ODD.values()
    assert odd == 6
    for kind in ("cmyk", "png"):  # re-encoded: the same picture to within what JPEG loses
        (photo,) = [p for p in photos if p.name == forms.ODD[kind]]
        before = np.asarray(Image.open(io.BytesIO(photo.data)).convert("RGB"), np.float32)
        errors = [
            np.abs(np.asarray(Image.open(io.BytesIO(stored)), np.float32) - before).mean()
            for _, stored in expected_samples(root, "train")
            if stored not in by_bytes and Image.open(io.BytesIO(stored)).size == before.shape[1::-1]
        ]
        assert min(errors) < 3


def test_the_command_reads_the_official_archives(photos: list[Photo], tmp_path: Path) -> None:
    forms.write("official", tmp_path / "in", photos)
    command = ["python", "tools/make_shards.py", tmp_path / "in", tmp_path / "out"]
    failed = run(command, code=2)
    for text in (
        "the official archives (official)",
        "this is not the whole of ImageNet-1k:",
        "classes: 3 instead of 1,000",
        "train: 18 instead of 1,281,167",
        "val: 9 instead of 50,000",
        "--allow-partial",
    ):
        assert text in failed.stderr
    done = run([*command, "--allow-partial"])
    assert json.loads(done.stdout)["splits"]["train"] == {
        "samples": 18,
        "shards": 1,
        "rejected": 0,
        "repaired": 2,
    }
    command[-1] = tmp_path / "other"
    wrong = run([*command, "--check-md5", "--allow-partial"], code=2)
    assert (
        "ILSVRC2012_img_train.tar: its MD5" in wrong.stderr and "download it again" in wrong.stderr
    )


def test_in_place_leaves_the_tars_and_indexes_them(photos: list[Photo], tmp_path: Path) -> None:
    root = tmp_path / "wds"
    forms.write("webdataset", root, photos)
    for name in ("notes.tmp", "load.part", "spool-1"):  # a user's own, whatever their names
        (root / name).write_text("mine")
    before = files_of(root)
    done = run(["python", "tools/make_shards.py", root, "--in-place"])
    assert json.loads(done.stdout)["splits"]["train"]["rejected"] == 2  # CMYK and PNG
    assert "must be re-encoded: leave out --in-place" in done.stderr
    after = files_of(root)
    assert {name: after[name] for name in before} == before
    for name in shards.SPLITS:
        expected = {p.data: p.label for p in photos if p.split == name}
        found = expected_samples(root, name)
        assert {image: label for label, image in found}.items() <= expected.items()
        assert len(found) == {"train": 16, "val": 9}[name]
    split = shards.open_split(root, "val")
    assert "imagenet1k-validation-00.tar, key ILSVRC2012_val_0000000" in split.describe(0)
    batches = loaders.eval_loader(split, config.Data(root=root), 4, 0, 1, CPU)
    assert sum(len(batch.labels) for batch in batches) == 9
    assert run(["python", "tools/verify_shards.py", root]).returncode == 0
    other = run(["python", "tools/make_shards.py", tmp_path, "--in-place"], code=2)
    assert "holds none of the forms that are recognised" in other.stderr


def test_unknown_source_lists_all_forms(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as error:
        sources.recognise(tmp_path)
    for name, form in sources.FORMS.items():
        assert f"{name}: {form.description}: {form.sign}" in str(error.value)
    with pytest.raises(ShardError, match="is not a folder"):
        sources.recognise(tmp_path / "nowhere")


def test_forms_that_lack_something_are_refused(photos: list[Photo], tmp_path: Path) -> None:
    def without(form: str, *names: str) -> Path:
        root = tmp_path / f"{form}-{len(os.listdir(tmp_path))}"
        forms.write(form, root, photos)
        for name in names:
            (root / name).unlink()
        return root

    no_class = without("webdataset-plain")
    with tarfile.open(no_class / "train-000001.tar", "w") as tar:
        info = tarfile.TarInfo("x/00000099.jpeg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    unlabelled = without("imagefolder-kaggle")
    rows = (unlabelled / "LOC_val_solution.csv").read_text().splitlines()
    (unlabelled / "LOC_val_solution.csv").write_text("\n".join(rows[:-1]))
    cut = without("official")
    train = cut / "ILSVRC2012_img_train.tar"
    train.write_bytes(train.read_bytes()[: train.stat().st_size // 2])
    for root, message in (
        (without("official", forms.DEVKIT), "devkit_t12.tar.gz is missing: it holds the labels"),
        (without("official", "ILSVRC2012_img_val.tar"), "img_val.tar is missing: add it"),
        (without("imagefolder-devkit", forms.DEVKIT), "is outside any class folder: sort val/"),
        (unlabelled, "LOC_val_solution.csv has no row for it"),
        (no_class, "sample x/00000099 holds .jpeg; expected one image and its label"),
        (cut, "ILSVRC2012_img_train.tar is damaged: .*compare its MD5"),
    ):
        with pytest.raises(ShardError, match=message):
            listed(root, tmp_path)


@pytest.mark.parametrize("form", ["parquet", "hf-tar"])
def test_a_damaged_compressed_source_is_named(
    photos: list[Photo], tmp_path: Path, form: str
) -> None:
    root = tmp_path / "source"
    forms.write(form, root, photos)
    path = sorted((root / "data").glob("train*"))[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ShardError, match=f"{path.name} is damaged"):
        listed(root, tmp_path)


def test_hostile_members_lead_nowhere(photos: list[Photo], tmp_path: Path) -> None:
    """Links, devices, absolute and climbing names in an archive."""
    root = tmp_path / "source"
    forms.write("official", root, photos)
    good = photos[0].data
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "a") as outer:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            for name in ("../../../escaped.JPEG", "/tmp/absolute.JPEG", "with space.é.JPEG"):
                info = tarfile.TarInfo(name)
                info.size = len(good)
                tar.addfile(info, io.BytesIO(good))
            for name, kind in (("link.JPEG", tarfile.SYMTYPE), ("hard.JPEG", tarfile.LNKTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            info = tarfile.TarInfo("device.JPEG")
            info.type = tarfile.CHRTYPE
            tar.addfile(info)
        info = tarfile.TarInfo("n01440764.tar")
        info.size = inner.tell()
        outer.addfile(info, io.BytesIO(inner.getvalue()))
        evil = tarfile.TarInfo("../n01440764.tar/../../x")
        outer.addfile(evil)
    out = tmp_path / "out"
    manifest = shard(root, out)
    assert manifest and manifest["splits"]["train"]["num_samples"] == 21
    assert manifest["ignored_files"] == 4
    written = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert written == {"source", "out"}
    with tarfile.open(out / "train-000000.tar") as tar:
        assert all(member.name[:9].isdigit() for member in tar)


def test_absurd_images_are_rejected(photos: list[Photo], tmp_path: Path) -> None:
    root = tmp_path / "source"
    forms.write("imagefolder", root, photos)
    folder = root / "train" / WNIDS[0]
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    Image.new("L", (70_000, 1)).save(folder / "long.png")
    manifest = shard(root, tmp_path / "out")
    assert manifest
    reasons = {i["name"]: i["reason"] for i in manifest["splits"]["train"]["rejected"]}
    assert "decompression bomb" in reasons[f"train/{WNIDS[0]}/bomb.png"]
    assert "more than the index can hold" in reasons[f"train/{WNIDS[0]}/long.png"]


def test_file_names_of_any_kind_are_read(photos: list[Photo], tmp_path: Path) -> None:
    """Spaces, dots, umlauts and folders within a class: names are for messages only."""
    for split in shards.SPLITS:
        for number, name in enumerate(("a b.v2.JPG", "Übung.jpeg", "deep/er/1.jpg")):
            path = tmp_path / "in" / split / "eine Klasse.v1" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photos[number].data)
    manifest = shard(tmp_path / "in", tmp_path / "out")
    assert manifest and manifest["classes"] == ["eine Klasse.v1"]
    assert sorted(image for _, image in expected_samples(tmp_path / "out", "val")) == sorted(
        photo.data for photo in photos[:3]
    )
    shutil.rmtree(tmp_path / "in")

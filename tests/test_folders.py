"""Folders of images give the right splits and labels, with links and clutter among them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_sources import image, names, put, scan, tar

from fasttrain.shards import ShardError

CAT, DOG = "n01440764", "n01443537"


def tar_of_images(path: Path, *names: str) -> None:
    """Writes a tar with the same small image under every name."""
    tar(path, [(name, image()) for name in names])


# --------------------------------------------------------------------------------------------------
# What is left out
# --------------------------------------------------------------------------------------------------


def test_clutter_is_left_out_at_any_depth_and_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "train/dog/in/b.png", "val/cat/c.png")
    put(
        tmp_path,
        "train/.ipynb_checkpoints/x.png",
        "train/cat/.ipynb_checkpoints/a-checkpoint.png",
        "train/dog/in/@eaDir/b.png/SYNOPHOTO_THUMB_M.jpg",
        "train/__MACOSX/dog/._b.png",
        "train/dog/._b.png",
        "train/cat/notes.txt",
        "train/cat/phone.heic",
        "val/Thumbs.db",
    )
    source, _ = scan(tmp_path)
    assert source.classes == ("cat", "dog")
    assert names(source) == {"train": ["cat/a.png", "dog/in/b.png"], "val": ["cat/c.png"]}
    assert source.skipped == {
        "in .ipynb_checkpoints/": 2,
        "in @eaDir/": 1,
        "in __MACOSX/": 1,
        "hidden": 1,
        "*.txt": 1,
        "*.heic": 1,
        "*.db": 1,
    }
    assert source.ignored == 8


@pytest.mark.parametrize(
    "end", "jpg JPEG jpe jfif png bmp gif webp tif TIFF ppm pgm pbm pnm".split()
)
def test_images_are_known_by_their_suffixes(tmp_path: Path, end: str) -> None:
    put(tmp_path, f"train/a/1.{end}", "val/a/1.png")
    assert names(scan(tmp_path)[0])["train"] == [f"a/1.{end}"]


def dangling_file(root: Path) -> None:
    (root / "train/cat/gone.png").symlink_to("/nowhere/gone.png")


def dangling_class(root: Path) -> None:
    (root / "train/gone").symlink_to("/nowhere/gone")


def dangling_all_of_a_class(root: Path) -> None:
    (root / "train/gone").mkdir()
    (root / "train/gone/gone.png").symlink_to("/nowhere/gone.png")


def dangling_deep(root: Path) -> None:
    (root / "val/cat/deep").mkdir()
    (root / "val/cat/deep/gone").symlink_to("/nowhere/gone")


@pytest.mark.parametrize(
    "break_one", [dangling_file, dangling_class, dangling_all_of_a_class, dangling_deep]
)
def test_links_that_lead_nowhere_are_refused_or_left_out(
    tmp_path: Path, break_one: Callable[[Path], None]
) -> None:
    put(tmp_path, "train/cat/a.png", "val/cat/b.png")
    break_one(tmp_path)
    with pytest.raises(ShardError, match=r"1 link leads nowhere, the first: .*gone.* -> /nowhere/"):
        scan(tmp_path)
    source, said = scan(tmp_path, allow_partial=True)
    assert source.skipped == {"links that lead nowhere": 1} and source.classes == ("cat",)
    assert names(source) == {"train": ["cat/a.png"], "val": ["cat/b.png"]}
    left_out = "the class gone is left out: all its links lead nowhere"
    assert said[:-1] == ([left_out] if break_one is dangling_all_of_a_class else [])
    assert said[-1].startswith("WARNING: 1 link leads nowhere, the first: ")


def test_a_split_that_is_a_dangling_link_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png")
    (tmp_path / "val").symlink_to("/nowhere/val")
    with pytest.raises(ShardError, match=r"1 link leads nowhere, .*/val -> /nowhere/val"):
        scan(tmp_path)


def test_a_dangling_test_that_is_not_needed_is_ignored(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "val/cat/b.png")
    (tmp_path / "test").symlink_to("/nowhere")
    assert not scan(tmp_path)[0].skipped


def test_links_that_lead_somewhere_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "pool", "dog/1.png", "more/2.png")
    root = put(tmp_path / "in", "train/cat/a.png", "val/cat/b.png")
    (root / "train/dog").symlink_to(tmp_path / "pool/dog")
    (root / "train/cat/more").symlink_to(tmp_path / "pool/more")
    assert names(scan(root)[0])["train"] == ["cat/a.png", "cat/more/2.png", "dog/1.png"]
    (root / "train/cat/round").symlink_to(root / "train/cat")
    with pytest.raises(ShardError, match="round is a link to a folder that contains it"):
        scan(root)


def test_images_outside_any_class_are_refused_or_left_out(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "train/montage.png", "val/cat/b.png")
    with pytest.raises(ShardError, match=r"montage.png is outside any class folder: move it"):
        scan(tmp_path)
    assert scan(tmp_path, allow_partial=True)[0].skipped == {"outside any class folder": 1}


# --------------------------------------------------------------------------------------------------
# Names of splits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_val_may_have_other_names(tmp_path: Path, name: str) -> None:
    put(tmp_path, "train/cat/a.png", f"{name}/cat/b.png", "test/cat/c.png")
    source, said = scan(tmp_path)
    assert names(source) == {"train": ["cat/a.png"], "val": ["cat/b.png"]}
    assert said == ["test/ is left out: test is not used if there is a val split"]


@pytest.mark.parametrize("pair", [("Train", "Test"), ("training_set", "test_set")])
def test_test_serves_as_val_where_there_is_none(tmp_path: Path, pair: tuple[str, str]) -> None:
    put(tmp_path, f"{pair[0]}/cat/a.png", f"{pair[1]}/cat/c.png")
    source, said = scan(tmp_path)
    assert names(source) == {"train": ["cat/a.png"], "val": ["cat/c.png"]}
    assert said == [f"there is no val split: {pair[1]}/ is used as val"]


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "val/cat/b.png", "valid/cat/c.png")
    with pytest.raises(ShardError, match="val/ and valid/ both name the val split"):
        scan(tmp_path)


def test_a_class_of_val_that_train_lacks_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "val/cat/b.png", "val/dog/c.png")
    with pytest.raises(ShardError, match="val holds images of dog, a class that train does not"):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["Cat", "cat ", "Ko\u0308ter"])
def test_classes_that_look_the_same_are_named(tmp_path: Path, name: str) -> None:
    plain = {"Ko\u0308ter": "K\u00f6ter"}.get(name, "cat")
    put(tmp_path, f"train/{plain}/a.png", f"val/{name}/b.png")
    with pytest.raises(ShardError, match=r"'.*' and '.*' look the same but differ: rename one"):
        scan(tmp_path)


def test_folders_beside_named_splits_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "seg_train/cat/a.png", "seg_test/cat/b.png", "seg_pred/deep/c.png")
    assert names(scan(tmp_path)[0]) == {"train": ["cat/a.png"], "val": ["cat/b.png"]}


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    put(tmp_path, *(f"{c}/{n}.png" for c in ("test tube", "train station") for n in range(2)))
    assert scan(tmp_path, val_fraction=0.5)[0].classes == ("test tube", "train station")


def test_tars_that_are_too_deep_are_refused(tmp_path: Path) -> None:
    tar_of_images(tmp_path / "train/part1/0.tar", "a.png")
    put(tmp_path, "val/cat/a.png")
    with pytest.raises(
        ShardError, match=r"part1/0.tar is too deep: move it up, because tars must be in .*train"
    ):
        scan(tmp_path)


def test_the_folder_that_was_meant_is_named(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "train/cat/a.png", "val/cat/b.png")
    with pytest.raises(ShardError, match=f"did you mean {root}?"):
        scan(tmp_path)
    with pytest.raises(ShardError, match=f"is one split of {root}: name that folder as SOURCE"):
        scan(root / "train")
    put(tmp_path / "twice", *(f"{s}/{s}/{c}/a.png" for s in ("train", "val") for c in "ab"))
    with pytest.raises(
        ShardError, match=r"train holds a single folder, train/, which holds 2 folders"
    ):
        scan(tmp_path / "twice")


# --------------------------------------------------------------------------------------------------
# Val alone, and val drawn from train
# --------------------------------------------------------------------------------------------------


def test_a_missing_split_comes_with_the_remedy(tmp_path: Path) -> None:
    plain = put(tmp_path / "plain", "cat/a.png", "dog/b.png")
    with pytest.raises(ShardError, match=r"holds classes \(cat, dog\) and no splits\n--val-frac"):
        scan(plain)
    train = put(tmp_path / "train-alone", "train/cat/a.png")
    with pytest.raises(ShardError, match=r"no folder val/; (.|\n)*--val-fraction 0.1 draws"):
        scan(train)
    val = put(tmp_path / "val-alone", "val/cat/a.png")
    with pytest.raises(ShardError, match=r"no folder train/; (.|\n)*--val-only makes"):
        scan(val)


@pytest.mark.parametrize("inside", ["", "val/", "test/"])
def test_val_only_needs_no_train(tmp_path: Path, inside: str) -> None:
    put(tmp_path, f"{inside}cat/a.png", f"{inside}ant/b.png")
    source, _ = scan(tmp_path, val_only=True)
    assert names(source) == {"val": ["ant/b.png", "cat/a.png"]}
    assert source.classes == ("ant", "cat")
    order = ("zebra", "cat", "ant")
    source, said = scan(tmp_path, val_only=True, classes=order)
    assert source.classes == order and source.splits["val"].labels.tolist() == [2, 1]
    assert "1 of the 3 classes have no image in val" in said
    with pytest.raises(ShardError, match="images of ant, a class that the list of classes does"):
        scan(tmp_path, val_only=True, classes=("cat", "zebra"))


def test_numeric_class_names_are_sorted_as_text_or_as_numbers(tmp_path: Path) -> None:
    put(tmp_path, *(f"val/{number}/a.png" for number in (0, 2, 10)))
    source, said = scan(tmp_path, val_only=True)
    assert source.classes == ("0", "10", "2")
    assert "sorted as text: 0, 10, 2 are labels 0, 1 and 2; --classes-by-number" in said[0]
    source, said = scan(tmp_path, val_only=True, by_number=True)
    assert source.classes == ("0", "2", "10") and not said
    order = tuple("lkjihgfedcba")
    with pytest.raises(ShardError, match="--classes-by-number takes folder 7 as class 7"):
        scan(tmp_path, val_only=True, classes=order)
    source, _ = scan(tmp_path, val_only=True, classes=order, by_number=True)
    assert source.classes == order
    assert dict(
        zip(source.splits["val"].labels.tolist(), source.splits["val"].names, strict=True)
    ) == {
        0: "l/a.png",
        2: "j/a.png",
        10: "b/a.png",
    }


@pytest.mark.parametrize("inside", ["", "train/"])
def test_val_fraction_draws_from_each_class(tmp_path: Path, inside: str) -> None:
    put(tmp_path, *(f"{inside}cat/{number}.png" for number in range(30)))
    put(tmp_path, *(f"{inside}dog/{number}.png" for number in range(10)), f"{inside}one/0.png")
    drawn, _ = scan(tmp_path, val_fraction=0.1)
    val = names(drawn)["val"]
    assert [name[:3] for name in val] == ["cat"] * 3 + ["dog"]
    assert len(set(val) | set(names(drawn)["train"])) == 41 and len(drawn.splits["train"]) == 37
    assert names(scan(tmp_path, val_fraction=0.1)[0])["val"] == val
    assert names(scan(tmp_path, val_fraction=0.1, seed=1)[0])["val"] != val
    put(tmp_path, f"{inside}cat/new.png")
    assert len(set(names(scan(tmp_path, val_fraction=0.1)[0])["val"]) - set(val)) <= 1


def test_val_fraction_is_refused_if_there_is_a_val_split(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "val/cat/b.png")
    with pytest.raises(ShardError, match=r"has a val split already \(.*val\); leave"):
        scan(tmp_path, val_fraction=0.5)


def test_train_may_be_the_name_of_a_class(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{number}.png" for name in ("bus", "train") for number in range(4)))
    source, _ = scan(tmp_path, val_fraction=0.25)
    assert source.classes == ("bus", "train") and len(source.splits["val"]) == 2


# --------------------------------------------------------------------------------------------------
# ImageNet in pieces
# --------------------------------------------------------------------------------------------------


def test_tiny_imagenet_is_read_as_downloaded(tmp_path: Path) -> None:
    put(tmp_path, f"train/{CAT}/images/{CAT}_0.JPEG", f"train/{DOG}/images/{DOG}_0.JPEG")
    put(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    rows = f"val_0.JPEG\t{DOG}\t0\t0\t9\t9\nval_1.JPEG\t{CAT}\t0\t0\t9\t9\n"
    (tmp_path / "val/val_annotations.txt").write_text(rows)
    source, _ = scan(tmp_path)
    assert source.classes == (CAT, DOG)
    assert names(source)["val"] == [f"{CAT}/val_1.JPEG", f"{DOG}/val_0.JPEG"]
    put(tmp_path, "val/images/val_2.JPEG")
    with pytest.raises(ShardError, match=r"val_2.JPEG: .*val_annotations.txt has no row for it"):
        scan(tmp_path)


def test_tiny_imagenet_may_be_sorted_in_part(tmp_path: Path) -> None:
    put(tmp_path, *(f"train/{c}/images/{c}_0.png" for c in ("n1", "n2")))
    put(tmp_path, "val/n1/val_0.png", "val/images/val_1.png", "val/images/val_2.png")
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_0.png\tn1\nval_1.png\tn2\nval_2.png\tn1\n"
    )
    source, said = scan(tmp_path)
    assert names(source)["val"] == ["n1/val_0.png", "n1/val_2.png", "n2/val_1.png"] and not said
    put(tmp_path, "val/n2/val_1.png")
    with pytest.raises(ShardError, match=r"val/n2/val_1.png is also in .*val/images and would"):
        scan(tmp_path)
    (tmp_path / "val/images/val_1.png").unlink()
    put(tmp_path, "val/n2/renamed.png")
    assert len(scan(tmp_path)[0].splits["val"]) == 4
    (tmp_path / "val/n2/val_1.png").rename(tmp_path / "val/n1/val_1.png")
    with pytest.raises(ShardError, match=r"val_1.png is in the class n1, but .* says n2: move"):
        scan(tmp_path)


def test_a_locale_without_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{s}/{c}/0.png" for s in ("train", "val") for c in ("Übung", "dog")))
    assert scan(tmp_path)[0].classes == ("dog", "Übung")
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(ShardError, match=r"'\\xdcbung' was read as iso8859-1, .*UTF8=1"):
        scan(tmp_path)


def test_two_classes_whose_names_look_the_same_give_a_warning(tmp_path: Path) -> None:
    put(tmp_path, *(f"{s}/{c}/0.png" for s in ("train", "val") for c in ("Cat", "cat", "dog")))
    assert scan(tmp_path)[1] == [
        "WARNING: 'Cat' and 'cat' are two classes; if they are one, rename one"
    ]


def test_a_class_of_val_without_images_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png")
    (tmp_path / "val/b").mkdir()
    assert scan(tmp_path)[1] == [f"WARNING: {tmp_path / 'val/b'} holds no images"]
    (tmp_path / "train/c").mkdir()
    with pytest.raises(ShardError, match=r"train/c holds no images; remove the class or fill it"):
        scan(tmp_path)


def test_tars_of_classes_are_read(tmp_path: Path) -> None:
    tar_of_images(tmp_path / f"train/{CAT}.tar", f"{CAT}_1.JPEG", f"{CAT}_2.JPEG")
    tar_of_images(tmp_path / f"train/{DOG}.tar", f"{DOG}_1.JPEG")
    put(tmp_path, f"train/{DOG}/{DOG}_1.JPEG", f"val/{CAT}/a.png")
    source, _ = scan(tmp_path)
    assert names(source)["train"] == [
        f"{CAT}/{CAT}_1.JPEG",
        f"{CAT}/{CAT}_2.JPEG",
        f"{DOG}/{DOG}_1.JPEG",
    ]
    assert source.skipped == {"tars of classes that are unpacked beside them": 1}
    assert len(scan(tmp_path / "train", val_fraction=0.5)[0].splits["val"]) == 1
    put(tmp_path, f"train/{DOG}/{DOG}_2.JPEG")
    with pytest.raises(
        ShardError, match=f"{DOG}.tar holds 1 images, but the folder {DOG}/ beside it holds 2"
    ):
        scan(tmp_path)


def test_the_archive_of_val_may_stand_beside_an_unpacked_train(tmp_path: Path) -> None:
    put(tmp_path, f"train/{CAT}/a.png")
    tar_of_images(tmp_path / "ILSVRC2012_img_val.tar", "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ShardError, match=r"devkit_t12.tar.gz is missing: it holds the labels"):
        scan(tmp_path)
    rows = f"ImageId,PredictionString\nILSVRC2012_val_00000001,{CAT} 1 2 3 4 \n"
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    source, _ = scan(tmp_path)
    assert names(source)["val"] == [f"{CAT}/ILSVRC2012_val_00000001.JPEG"]
    (tmp_path / "val").mkdir()  # and its archive is still packed
    assert names(scan(tmp_path)[0]) == names(source)
    (tmp_path / "val").rmdir()
    (tmp_path / "train").rename(tmp_path / "away")
    (tmp_path / "away").rename(tmp_path.parent / f"{tmp_path.name}-away")
    assert names(scan(tmp_path, val_only=True)[0]).keys() == {"val"}


def test_flat_images_may_hold_the_class_in_their_names(tmp_path: Path) -> None:
    put(tmp_path, f"train/{CAT}_1_{CAT}.JPEG", f"train/{DOG}_7.JPEG")
    put(tmp_path, f"val/ILSVRC2012_val_00000001_{DOG}.JPEG")
    source, _ = scan(tmp_path)
    assert names(source) == {
        "train": [f"{CAT}/{CAT}_1_{CAT}.JPEG", f"{DOG}/{DOG}_7.JPEG"],
        "val": [f"{DOG}/ILSVRC2012_val_00000001_{DOG}.JPEG"],
    }

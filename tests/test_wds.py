"""WebDataset tars give the right splits, members and labels, and faulty ones are named."""

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from small_sources import image, names, pair, sample, samples, scan, tar

from fasttrain import classes
from fasttrain.shards import ShardError

# --------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["{}-0.tar", "{}/00000.tar", "strain-{}-0.tar"])
def test_test_is_left_out_where_there_is_val(tmp_path: Path, layout: str) -> None:
    for split, labels in (("train", (0, 1)), ("val", (0,)), ("test", (1, 1, 1))):
        tar(tmp_path / layout.format(split), samples(*labels))
    source, said = scan(tmp_path)
    assert source.form == "webdataset"
    assert {s: listing.labels.tolist() for s, listing in source.splits.items()} == {
        "train": [0, 1],
        "val": [0],
    }
    assert said == [
        f"{layout.format('test')} is left out: test is not used if there is a val split"
    ]


def test_test_serves_as_val_where_there_is_none(tmp_path: Path) -> None:
    tar(tmp_path / "train/0.tar", samples(0, 1, 0))
    for number in range(2):
        tar(tmp_path / f"test/{number}.tar", samples(1))
    source, said = scan(tmp_path)
    assert names(source)["val"] == ["000001/0000.JPEG"] * 2
    assert said == ["there is no val split: test/0.tar and 1 more are used as val"]
    source, said = scan(tmp_path, val_fraction=0.5)
    assert [len(source.splits[split]) for split in ("train", "val")] == [2, 1]
    assert said == ["test/0.tar and 1 more are left out: val is drawn from train"]


def test_tars_without_a_split_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "data-0.tar", samples(0, 1, 0, 1))
    with pytest.raises(ShardError, match=r"data-0.tar: expected train, val or test as a word"):
        scan(tmp_path)
    assert scan(tmp_path, val_only=True)[0].splits.keys() == {"val"}
    assert len(scan(tmp_path, val_fraction=0.5)[0].splits["val"]) == 2
    tar(tmp_path / "train-0.tar", samples(0))
    with pytest.raises(ShardError, match=r"data-0.tar: expected train, val or test as a word"):
        scan(tmp_path, val_fraction=0.5)
    (tmp_path / "data-0.tar").unlink()
    with pytest.raises(ShardError, match=r"no tar has val as a word .*; --val-fraction 0.1 draws"):
        scan(tmp_path)


def test_a_label_of_val_that_train_lacks_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, samples(0, 1, 2), samples(1, 7))
    with pytest.raises(
        ShardError, match=r"val holds images of 000007, a class that train does not"
    ):
        scan(tmp_path)


def test_tables_beside_the_tars_are_no_images(tmp_path: Path) -> None:
    pair(tmp_path, samples(0))
    for name in ("train-0.parquet", "val-0.parquet", "train-0_stats.json"):  # of img2dataset
        (tmp_path / name).write_bytes(b"PAR1")
    assert scan(tmp_path)[0].form == "webdataset"


def test_in_place_the_tars_must_be_in_one_folder(tmp_path: Path) -> None:
    tar(tmp_path / "train/0.tar", samples(0))
    tar(tmp_path / "val/0.tar", samples(0))
    with pytest.raises(ShardError, match=r"--in-place: .*train/0.tar is in .* as train-0.tar"):
        scan(tmp_path, in_place=True)


def test_in_place_labels_must_be_in_cls(tmp_path: Path) -> None:
    pair(tmp_path, [("0.png", image()), ("0.json", b'{"label": 1}')])
    with pytest.raises(
        ShardError, match=r"from there \(with a folder OUT in place of --in-place\)$"
    ):
        scan(tmp_path, in_place=True)


def test_a_tar_that_is_a_dangling_link_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, samples(0))
    (tmp_path / "train-1.tar").symlink_to("/nowhere/train-1.tar")
    with pytest.raises(ShardError, match=r"1 link leads nowhere, .* -> /nowhere/train-1.tar"):
        scan(tmp_path)


# --------------------------------------------------------------------------------------------------
# Members
# --------------------------------------------------------------------------------------------------


def test_members_that_macos_adds_are_left_out(tmp_path: Path) -> None:
    members = [(f"./{name}", data) for name, data in samples(0, 1)]
    mac = [x for name, data in members for x in ((f"./._{name[2:]}", b"\0\5\x16\7"), (name, data))]
    source, _ = scan(pair(tmp_path, [*mac, ("__MACOSX/._0000.png", b"\0")], members))
    assert names(source)["train"] == ["000000/0000.JPEG", "000001/0001.JPEG"]
    assert source.skipped == {"hidden": 4, "in __MACOSX/": 1}


def test_names_may_have_dots_and_any_case(tmp_path: Path) -> None:
    dots = [x for n in range(3) for x in sample(f"a/photo.{n}", n)]
    loud = [(name.upper(), data) for name, data in sample("B", 1)]
    source, _ = scan(
        pair(tmp_path, [*dots, *loud], [("s.input.png", image()), ("s.output.cls", b"2")])
    )
    assert source.splits["train"].labels.tolist() == [0, 1, 1, 2]


def test_each_fault_of_a_sample_is_named(tmp_path: Path) -> None:
    plain = samples(0, 1)
    captioned = [("0.png", image()), ("0.json", b'{"caption": "x", "label": 1}'), ("0.txt", b"x")]
    linked = tmp_path / "linked/train-0.tar"
    pair(linked.parent, plain)
    with tarfile.open(linked, "a") as archive:
        info = tarfile.TarInfo("9.png")
        info.type, info.linkname = tarfile.LNKTYPE, "0000.png"
        archive.addfile(info)
        info = tarfile.TarInfo("9.cls")
        archive.addfile(info)
    for number, (members, message) in enumerate(
        (
            (
                plain[::2] + plain[1::2],
                r"train-0.tar is not sorted, .*: the members of sample 0000 are not adjacent",
            ),
            (
                [*plain, *samples(1)],  # tar --append with another label
                r"or was appended to: the members of sample 0000 are not adjacent",
            ),
            (plain[:1], r"sample 0000 holds \.png; expected one image and its label \(\.cls\)$"),
            (plain[1:2], r"sample 0000 holds \.cls; expected one image"),
            (
                [*sample("0", 1), ("0.seg.png", image())],
                r"sample 0 holds \.png, \.cls, \.seg\.png;",
            ),
            (captioned, r"0.json has the keys caption, label: --label-key label takes the labels"),
            (captioned[::2], r"0.txt holds 'x': --label-key txt takes that as the class"),
            (
                [("0.npy", b"x"), ("0.cls", b"1")],
                r"sample 0 holds \.npy, \.cls; expected one image",
            ),
        )
    ):
        with pytest.raises(ShardError, match=message):
            scan(pair(tmp_path / str(number), members))
    with pytest.raises(ShardError, match=r"the tar has 1 links, which are not followed: make it"):
        scan(linked.parent)


@pytest.mark.parametrize("end", [".tar", ".tar.gz"])
def test_compressed_tars_are_recognised_under_any_name(tmp_path: Path, end: str) -> None:
    pair(tmp_path, samples(0))
    path = tmp_path / "train-0.tar"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    (tmp_path / f"train-0{end}").write_bytes(packed)
    (tmp_path / "val-0.tar").unlink()
    (tmp_path / f"val-0{end}").write_bytes(packed)
    with pytest.raises(
        ShardError, match=rf"train-0{end} is compressed.*does not allow random access"
    ):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["train-1.tar.gz", "train/1.tar.zst", "TRAIN-1.TGZ"])
def test_a_compressed_tar_beside_plain_tars_is_not_forgotten(tmp_path: Path, name: str) -> None:
    pair(tmp_path, samples(0))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ShardError, match=rf"{name} is compressed .*: (gzip|zstd) -dc < \S*{name[-7:]}"
    ):
        scan(tmp_path)
    (tmp_path / name).rename(tmp_path / "train-0.tar.gz")  # unpacked beside itself
    if "/" in name:
        (tmp_path / "train").rmdir()
    (tmp_path / "captions.tar.gz").write_bytes(b"")
    assert scan(tmp_path)[0].skipped == {"compressed tars": 2}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train/0.tar.gz", "gzip -dc < 0.tar.gz > 0.tar"),
        ("train-0.tar.xz", "xz -dc < train-0.tar.xz > train-0.tar"),
        ("train.0.TBZ2", "bzip2 -dc < train.0.TBZ2 > train.0.tar"),
    ],
)
def test_compressed_tars_come_with_the_command_to_unpack_them(
    tmp_path: Path, name: str, command: str
) -> None:
    for path in (tmp_path / name, tmp_path / name.replace("train", "val")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(
        ShardError, match=f"{name} is compressed .* to plain tars first: {command}$"
    ):
        scan(tmp_path)


def test_the_suffix_of_a_tar_may_be_in_capitals(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", samples(0))
    tar(tmp_path / "train-1.TAR", samples(1))
    tar(tmp_path / "val-0.Tar", samples(1))
    source, _ = scan(tmp_path)
    assert [len(source.splits[split]) for split in ("train", "val")] == [2, 1]


def test_sparse_members_and_pointers_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, samples(0))
    sparse = tarfile.TarInfo("9.png")
    sparse.size, sparse.pax_headers = 0, {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse)
    with pytest.raises(ShardError, match=r"'9.png' is stored as a sparse file"):
        scan(tmp_path)
    (tmp_path / "train-0.tar").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    )
    with pytest.raises(
        ShardError, match=r"is a Git LFS pointer, not the tar: download it with git"
    ):
        scan(tmp_path)


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    source, _ = scan(pair(tmp_path, samples("tabby cat", "ant\n", "ant"), samples("tabby cat")))
    assert source.classes == ("ant", "tabby cat")
    assert names(source)["val"] == ["tabby cat/0000.JPEG"]
    assert source.splits["train"].labels.tolist() == [0, 0, 1]
    with pytest.raises(
        ShardError, match=r"--in-place: .* has the label 'tabby cat', but the labels"
    ):
        scan(tmp_path, in_place=True)
    (tmp_path / "classes.txt").write_text("tabby cat\nzebra\nant\n")
    source, said = scan(tmp_path)
    assert source.classes == ("tabby cat", "zebra", "ant")
    assert source.splits["train"].labels.tolist() == [2, 2, 0]
    assert said[0] == f"the 3 classes are in the order of {tmp_path / 'classes.txt'}"
    tar(tmp_path / "val-1.tar", samples(0))
    with pytest.raises(
        ShardError, match=r"'tabby cat', .*val-1.tar has the label 0: labels must be all"
    ):
        scan(tmp_path)


def test_numbers_get_the_names_of_a_list(tmp_path: Path) -> None:
    pair(tmp_path, samples(2, 0), samples(2))
    (tmp_path / "classnames.txt").write_text("wasp\nbee\nant\n")
    source, _ = scan(tmp_path)
    assert source.classes == ("wasp", "bee", "ant")
    assert source.splits["val"].labels.tolist() == [2] and names(source)["val"] == ["ant/0000.JPEG"]
    (tmp_path / "classnames.txt").write_text("wasp\nbee\n")
    with pytest.raises(ShardError, match=r"label 2: the list of classes ends at 1"):
        scan(tmp_path)
    (tmp_path / "classnames.txt").write_text("wasp\nbee\nbee\n")
    source, said = scan(tmp_path)
    assert source.classes == ("000000", "000002")
    assert "classnames.txt is not used: the class bee occurs 2 times" in said[0]


@pytest.mark.parametrize("values", [(3, 1), ("cat", "ant"), ("3", "1")])
def test_labels_may_be_in_json(tmp_path: Path, values: tuple[Any, Any]) -> None:
    train = [m for n, v in enumerate(values) for m in sample(str(n), json.dumps({"y": v}), "json")]
    source, _ = scan(pair(tmp_path, train), label_key="y")
    expected = ("ant", "cat") if "cat" in values else ("000001", "000003")
    assert source.classes == expected and source.splits["train"].labels.tolist() == [0, 1]
    assert source.splits["val"].labels.tolist() == [1]
    with pytest.raises(ShardError, match=r"0.json has the keys y, not 'label': name the right one"):
        scan(tmp_path, label_key="label")


def test_labels_may_be_in_txt(tmp_path: Path) -> None:
    members = [m for n, name in enumerate("ba") for m in sample(str(n), name, "txt")]
    assert scan(pair(tmp_path, members), label_key="txt")[0].classes == ("a", "b")


@pytest.mark.parametrize("value", ["1.0", "nan", "", "a\nb", "x" * 300])
def test_labels_that_are_neither_numbers_nor_names_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ShardError, match=r"0000.cls holds .*; expected a whole number or the name"):
        scan(pair(tmp_path, samples(value)))


@pytest.mark.parametrize("value", [None, True, 1.0, [1]])
def test_labels_in_json_that_are_neither_are_refused(tmp_path: Path, value: Any) -> None:
    members = sample("0", json.dumps({"label": value}), "json")
    with pytest.raises(ShardError, match=r"0.json: 'label' is .* \(\w+\); expected a whole number"):
        scan(pair(tmp_path, members), label_key="label")


def test_labels_that_count_from_one_are_recognised(tmp_path: Path) -> None:
    pair(tmp_path, samples(1, 2))
    assert scan(tmp_path)[0].splits["train"].labels.tolist() == [0, 1]
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ShardError, match=r"label 2: .* count from 1: put a line for label 0"):
        scan(tmp_path)
    (tmp_path / "classes.txt").write_text("unused\nant\nbee\n")
    assert names(scan(tmp_path)[0])["val"] == ["ant/0000.JPEG"]


def test_a_label_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"label -1: a negative label means no label"):
        scan(pair(tmp_path, samples(0, -1)))


def test_class_lists_are_read_from_files_runs_and_data_sets(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    path.write_text("b\na\n")
    assert classes.read_list(path) == ("b", "a")
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"classes": ["d", "c"]}')
    assert classes.read_list(tmp_path / "run") == classes.read_list(checkpoint) == ("d", "c")
    (tmp_path / "manifest.json").write_text('{"classes": ["f", "e"]}')
    assert classes.read_list(tmp_path) == ("f", "e")
    for text, message in (
        ("", "holds no class"),
        ("a\n\nb", "empty line"),
        ("a\na", "a occurs 2"),
    ):
        path.write_text(text)
        with pytest.raises(ShardError, match=f"--classes .*order.txt: .*{message}"):
            classes.read_list(path)
    with pytest.raises(ShardError, match=r"neither a data set .* nor a checkpoint"):
        classes.read_list(tmp_path / "run/checkpoints")
    with pytest.raises(ShardError, match=r"nowhere.txt: cannot be read \(No such file"):
        classes.read_list(tmp_path / "nowhere.txt")

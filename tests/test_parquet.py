"""Parquet files of the usual columns, types and layouts are read, and others are refused."""

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import shard
from PIL import Image
from pyarrow import parquet as pq
from shard_files import expected_samples

from fasttrain import sources
from fasttrain.listing import Options, Source
from fasttrain.shards import ShardError

TRAIN, VAL, TEST = (f"data/{split}-00000-of-00001.parquet" for split in ("train", "val", "test"))


def image(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (24, 16), (10 * number, 99, 0)).save(data, "JPEG")
    return data.getvalue()


def table(
    labels: Sequence[Any] = (0, 1, 0, 1), names: Sequence[str] = ("image", "label"), **columns: Any
) -> pa.Table:
    """One image a label, in a struct of bytes and path; `columns` are added or replaced."""
    rows = [{"bytes": image(n), "path": f"/far/away/{n}.jpg"} for n in range(len(labels))]
    return pa.table({names[0]: rows, names[1]: list(labels)} | columns)


def put(root: Path, files: dict[str, pa.Table]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, root / name)
    return root


def scanned(root: Path, **options: Any) -> tuple[Source, list[str]]:
    """Lists the source at `root`. Returns it and the messages."""
    said: list[str] = []
    spool = root.with_name(f"{root.name}-spool")
    spool.mkdir(exist_ok=True)
    source = sources.scan(
        root,
        sources.recognise(root),
        spool,
        lambda tasks: [task() for task in tasks],
        said.append,
        Options(**options),
    )
    return source, said


def fault(root: Path, **options: Any) -> str:
    """The message about a faulty source, which comes before anything is unpacked."""
    with pytest.raises(ShardError) as error:
        scanned(root, **options)
    assert not [*root.with_name(f"{root.name}-spool").iterdir()]
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [("image", "label"), ("img", "label"), ("img", "fine_label"), ("Image", "LABEL")],
)
def test_columns_are_found_by_their_usual_names(names: tuple[str, str], tmp_path: Path) -> None:
    content = table(names=names, id=["a"] * 4, coarse_label=[0] * 4)
    source, said = scanned(put(tmp_path / "in", {TRAIN: content, VAL: content}))
    assert source.splits["train"].labels.tolist() == [0, 0, 1, 1]
    assert source.classes == ("000000", "000001")
    assert f"images are in the column {names[0]}, labels in {names[1]}" in said[0]


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    content = table(names=("a", "kind"), b=[b"not this"] * 4, coarse=[1, 1, 1, 1])
    root = put(tmp_path / "in", {TRAIN: content, VAL: content})
    text = fault(root)
    assert f"{root / TRAIN}: none of the columns a (struct<bytes: " in text
    assert "b (binary), coarse (int64) is known to hold images: name a column" in text
    assert "is known to hold labels: name a column" in fault(root, image_column="a")
    source, _ = scanned(root, image_column="a", label_column="coarse")
    assert source.classes == ("000001",)
    source, _ = scanned(root, image_column="a", label_column="kind")  # not what was unpacked before
    assert source.classes == ("000000", "000001")
    assert "has no column d (--image-column), only a (struct" in fault(
        put(tmp_path / "other", {TRAIN: content, VAL: content}), image_column="d"
    )


def test_of_two_label_columns_the_usual_one_is_read(tmp_path: Path) -> None:
    content = table(label=[0, 1, 1, 1], category=[5, 5, 5, 5])
    _, said = scanned(put(tmp_path / "in", {TRAIN: content, VAL: content}))
    assert said[0].endswith("labels in label (choose category with --label-column)")


TEXT = ["dog", "cat", "dog", "cat"]


@pytest.mark.parametrize(
    "labels", [TEXT, pa.array(TEXT).dictionary_encode(), pa.array(TEXT, pa.large_string())]
)
def test_text_labels_are_names_of_classes(labels: Any, tmp_path: Path) -> None:
    content = table(label=labels)
    source, _ = scanned(put(tmp_path / "in", {TRAIN: content, VAL: content}))
    assert source.classes == ("cat", "dog")
    assert source.splits["train"].names == ["cat/1.jpg", "cat/3.jpg", "dog/0.jpg", "dog/2.jpg"]
    names = ("dog", "cat", "cow")
    listed, _ = scanned(tmp_path / "in", classes=names)
    assert listed.classes == names and listed.splits["val"].labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), "struct"])
def test_images_may_be_bare_bytes(kind: Any, tmp_path: Path) -> None:
    rows: Any = [image(n) for n in range(4)]
    if kind == "struct":  # without a path
        rows = [{"bytes": data} for data in rows]
    else:
        rows = pa.array(rows, kind)
    content = table(image=rows)
    shard(put(tmp_path / "in", {TRAIN: content, VAL: content}), tmp_path / "out")
    expected = sorted((n % 2, image(n)) for n in range(4))
    assert sorted(expected_samples(tmp_path / "out", "train")) == expected


@pytest.mark.parametrize("labels", [pa.array([0, 1, 0, 1], pa.uint8()), [False, True] * 2])
def test_labels_may_be_any_whole_numbers(labels: Any, tmp_path: Path) -> None:
    content = table(label=labels)
    source, _ = scanned(put(tmp_path / "in", {TRAIN: content, VAL: content}))
    assert source.splits["train"].labels.tolist() == [0, 0, 1, 1]


def test_class_names_in_the_schema_are_read(tmp_path: Path) -> None:
    about = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}
    note = {"huggingface": json.dumps({"info": {"features": about}})}
    content = table().replace_schema_metadata(note)
    source, _ = scanned(put(tmp_path / "in", {TRAIN: content, VAL: table()}))
    assert source.classes == ("zebra", "ant")  # the order of the numbers
    about["label"]["names"] = ["ant", "zebra"]
    note = {"huggingface": json.dumps({"info": {"features": about}})}
    put(tmp_path / "in", {VAL: table().replace_schema_metadata(note)})
    with pytest.raises(ShardError, match="give different class names to the same numbers"):
        scanned(tmp_path / "in")


@pytest.mark.parametrize(
    "layout",
    [
        ("train.parquet", "validation.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("train/0000.parquet", "val/0000.parquet"),
        ("plain/train-0.parquet", "plain/test-0.parquet"),
        ("data/train-00000-of-00001-0af31c.parquet", "data/valid-00000-of-00001-9e.parquet"),
    ],
)
def test_usual_layouts_of_files_are_read(layout: tuple[str, str], tmp_path: Path) -> None:
    first, second = layout
    root = put(tmp_path / "in", {first: table([0, 1, 1]), second: table([1, 0])})
    (root / ".cache").mkdir()
    (root / ".cache" / "train.parquet").write_bytes(b"not looked into")
    source, _ = scanned(root)
    assert [len(listing) for listing in source.splits.values()] == [3, 2]


def test_test_is_used_only_where_there_is_no_val(tmp_path: Path) -> None:
    root = put(tmp_path / "in", {TRAIN: table(), TEST: table([1, 1, 0])})
    source, said = scanned(root)
    assert len(source.splits["val"]) == 3
    assert said[0] == f"there is no val split: {TEST} is used as val"
    put(root, {VAL: table()})
    source, said = scanned(root)
    assert len(source.splits["val"]) == 4
    assert said[0] == f"{TEST} is left out: test is not used if there is a val split"


def test_several_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    files = {f"{home}/{split}.parquet": table() for home in "ab" for split in ("train", "val")}
    root = put(tmp_path / "in", files)
    assert fault(root) == (
        f"{root} holds several data sets (a/, b/): name the folder of one of them, such as "
        f"{root / 'b'}"
    )
    assert len(scanned(root / "b")[0].splits["train"]) == 4


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    root = put(tmp_path / "in", {TRAIN: table()})
    text = fault(root)
    assert "no parquet file has val as a word in its name or in its folder's name" in text
    assert f"(found {TRAIN}); download that split too, or draw val from train" in text
    source, _ = scanned(root, val_fraction=0.5)
    assert [len(listing) for listing in source.splits.values()] == [2, 2]


def test_files_of_a_numbered_export_must_be_complete(tmp_path: Path) -> None:
    """An interrupted download, and a second export into the folder of the first."""
    names = [f"data/train-{number:05}-of-00004.parquet" for number in (0, 2)]
    root = put(tmp_path / "in", dict.fromkeys(names, table()) | {VAL: table()})
    assert fault(root) == (
        f"{root / 'data'}: 2 of the 4 files like train-00000-of-00004.parquet are missing, the "
        "first is number 1; download them too, or do without them with --allow-partial"
    )
    assert len(scanned(root, allow_partial=True)[0].splits["train"]) == 8
    for other in (TRAIN, "data/train-00002-of-00004-0af31c.parquet"):
        put(tmp_path / "in", {other: table()})
        with pytest.raises(ShardError, match="are from two exports of the same data: move"):
            scanned(root, allow_partial=True)
        (root / other).unlink()


def struct(path: str | None, data: bytes | None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


WRONG: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "bytes are null": (
        lambda: table(image=[struct("/x.jpg", None)] * 4),
        "column image has no bytes in any row: the images are not in the file; make it again",
    ),
    "an image is null": (
        lambda: table(image=[struct("1.jpg", image(0)), None, None, struct("2.jpg", image(1))]),
        "column image has no bytes in 2 rows",
    ),
    "lists of images": (
        lambda: table(image=[[struct("1.jpg", image(1))]] * 4),
        "expected the bytes of image files (binary, or a struct of bytes and path)",
    ),
    "paths": (
        lambda: table(image=["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
        "column image is string; expected the bytes of image files",
    ),
    "pixels": (
        lambda: table(image=[[[0, 1], [2, 3]]] * 4),
        "column image is list<element: list<element: int64>>; expected the bytes",
    ),
    "float labels": (
        lambda: table([0.0, 1.0, 0.0, 1.0]),
        "column label is double; expected whole numbers or names of classes: name another with",
    ),
    "lists of labels": (
        lambda: table([[0], [1, 0], [0], [1]]),
        "column label is list<element: int64>; expected whole numbers or names of classes",
    ),
    "no label": (
        lambda: table([0, None, 0, 1]),
        "column label is null or empty in 1 rows: images without a label cannot be used",
    ),
    "all labels null": (lambda: table([None] * 4), "column label is null; expected whole numbers"),
    "hidden labels": (
        lambda: table([-1, -1, -1, -1]),
        "column label holds -1, which means no label: replace it by a file that has labels",
    ),
    "text in one": (
        lambda: table(["a", "b", "a", "b"]),
        "labels must be all numbers or all names of classes; make one of the files again",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_before_anything_is_unpacked(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    text = fault(put(tmp_path / "in", {TRAIN: table(), VAL: make()}))
    assert message in text and str(tmp_path / "in" / VAL) in text and "\n" not in text


@pytest.mark.parametrize("make", [lambda: table([0, None]), lambda: table(["a", ""])])
def test_rows_without_a_label_are_refused_also_without_statistics(
    make: Callable[[], pa.Table], tmp_path: Path
) -> None:
    root = put(tmp_path / "in", {VAL: make()})
    pq.write_table(make(), root / TRAIN, write_statistics=False)
    pq.write_table(make(), root / VAL, write_statistics=False)
    with pytest.raises(ShardError, match="column label is null or empty in row 1: images without"):
        scanned(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a Git LFS pointer, not the data",
        ),
        (b"PAR1 and then nothing", "is damaged: "),
        (b"", "is damaged: "),
    ],
)
def test_a_file_of_another_format_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    root = put(tmp_path / "in", {TRAIN: table()})
    (root / VAL).write_bytes(content)
    text = fault(root)
    assert text.startswith(f"{root / VAL} {message}") and "\n" not in text


def test_arrow_files_are_named(tmp_path: Path) -> None:
    both, one, cached = (tmp_path / name for name in ("both", "one", "cached"))
    for folder in (both / "train", both / "validation", one):
        folder.mkdir(parents=True)
        for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
            (folder / name).write_bytes(b"")
    cached.mkdir()
    (cached / "imagefolder-train.arrow").write_bytes(b"")
    saved = r"holds what save_to_disk of .*, which is not read: make parquet files of it:\n.*"
    for root, message in (
        (both, rf"both {saved}load_from_disk\('{both}'\); \[.*then give the folder NEW$"),
        (one, rf"one {saved}data.to_parquet\('NEW/train.parquet'\).* with --val-fraction 0.1$"),
        (cached, r"cached holds the cache of .* \(imagefolder-train.arrow\), .*: save each split"),
        (tmp_path, rf"both {saved}"),
    ):
        with pytest.raises(ShardError, match=re.compile(message, re.DOTALL)):
            sources.recognise(root)


def test_a_table_beside_folders_is_not_taken_for_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = tmp_path / "in" / split / "cat" / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(image(1))
    put(tmp_path / "in", {"train/metadata.parquet": table(), "index.parquet": table()})
    assert sources.recognise(tmp_path / "in") == "imagefolder"

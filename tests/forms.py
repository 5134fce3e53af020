"""Miniatures of the forms in which people hold ImageNet. Each form has the same images."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import photograph
from PIL import ExifTags, Image, ImageCms

WNIDS = ("n01440764", "n01443537", "n02105855")  # sorted: the label is the position
WORDS = (
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "Shetland sheepdog, Shetland sheep dog, Shetland",
)
DEVKIT_IDS = (2, 3, 1)  # of WNIDS: no id - 1 is the label
TRAIN_NUMBERS = (
    (10026, 937, 18, 6432, 12021, 27),
    (2442, 10007, 311, 22563, 45, 9876),
    (15011, 2933, 604, 77, 18345, 5120),
)
VAL_LABELS = (2, 0, 1, 0, 0, 2, 1, 2, 1)  # of the images number 1, 2, 3, ...
ODD = {
    "grey": "n01440764_27.JPEG",
    "progressive": "n01440764_6432.JPEG",
    "cmyk": "n01443537_311.JPEG",
    "exif": "n01443537_2442.JPEG",
    "icc": "n02105855_604.JPEG",
    "png": "n02105855_2933.JPEG",
}
TEST_NAME = "ILSVRC2012_test_00000001.JPEG"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class Photo:
    split: str  # train or val
    wnid: str
    name: str
    data: bytes

    @property
    def label(self) -> int:
        return WNIDS.index(self.wnid)

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".JPEG")

    @property
    def doubled_name(self) -> str:
        """The name on Hugging Face, n01440764_10026_n01440764.JPEG."""
        return f"{self.stem}_{self.wnid}.JPEG"


def photographs() -> list[Photo]:
    """6 images of each class to train on, those of ODD among them, and 9 to validate on."""
    rng = np.random.default_rng(0)
    kinds = {name: kind for kind, name in ODD.items()}
    names = [
        ("train", wnid, f"{wnid}_{number}.JPEG")
        for wnid, numbers in zip(WNIDS, TRAIN_NUMBERS, strict=True)
        for number in numbers
    ]
    names += [
        ("val", WNIDS[label], f"ILSVRC2012_val_{number:08d}.JPEG")
        for number, label in enumerate(VAL_LABELS, 1)
    ]
    return [Photo(split, wnid, name, encoded(rng, kinds.get(name))) for split, wnid, name in names]


def unlabelled() -> bytes:
    """An image of the test split, which belongs to no data set for training."""
    return encoded(np.random.default_rng(1))


def encoded(rng: np.random.Generator, kind: str | None = None) -> bytes:
    """A small JPEG, or one of the kinds of ODD."""
    width, height, subsampling = rng.integers((30, 30, 0), (91, 91, 3)).tolist()
    image = photograph(rng, width, height)
    options: dict[str, Any] = {"format": "JPEG", "quality": 90, "subsampling": subsampling}
    if kind == "grey":
        image = image.convert("L")
    elif kind == "progressive":
        options["progressive"] = True
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "exif":
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = 6
    elif kind == "icc":
        options["icc_profile"] = srgb_profile()
    elif kind == "png":
        options = {"format": "PNG"}
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def srgb_profile() -> bytes:
    """An ICC profile without the time at which it was made."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)
    return bytes(profile)


def write(form: str, root: Path, photos: Sequence[Photo]) -> None:
    """Makes the new folder `root` with the images in one of FORMS, as a user has it."""
    root.mkdir(parents=True)
    WRITERS[form](root, photos)


def of_split(photos: Sequence[Photo], split: str) -> list[Photo]:
    """The images of one split, in an order that is not that of their names."""
    found = sorted((photo for photo in photos if photo.split == split), key=lambda p: p.name)
    return random.Random(0).sample(found, len(found))


def halves(photos: Sequence[Photo]) -> tuple[Sequence[Photo], Sequence[Photo]]:
    middle = (len(photos) + 1) // 2
    return photos[:middle], photos[middle:]


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_folders(root: Path, photos: Sequence[Photo], flat_val: bool) -> None:
    """train/<wnid>/<name> and val/<wnid>/<name>, or val/<name>."""
    for photo in photos:
        flat = flat_val and photo.split == "val"
        put(root / photo.split / ("" if flat else photo.wnid) / photo.name, photo.data)


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_gz(members: Iterable[tuple[str, bytes]]) -> bytes:
    return gzip.compress(tar(members), mtime=0)


def meta_mat() -> bytes:
    """The classes by the id of the devkit, then a node above them, with the fields of the real."""
    from scipy.io import savemat

    leaves = sorted(zip(DEVKIT_IDS, WNIDS, WORDS, strict=True))
    none = np.array([], np.uint16)
    rows = [(number, wnid, words, "a leaf", 0, none, 0, 6) for number, wnid, words in leaves]
    children = np.array(DEVKIT_IDS[:2], np.uint16)
    rows.append((len(rows) + 1, "n00015388", "animal, beast", "a node", 2, children, 1, 0))
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    synsets: np.ndarray = np.empty((len(rows), 1), [(field, object) for field in fields.split()])
    for index, row in enumerate(rows):
        synsets[index, 0] = tuple(np.uint16(v) if isinstance(v, int) else v for v in row)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    # Its first 116 bytes are text, and say when it was made.
    return b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(116) + buffer.getvalue()[116:]


def devkit(photos: Sequence[Photo]) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz: line i of the ground truth is of the validation image i."""
    val = sorted(of_split(photos, "val"), key=lambda photo: photo.name)
    truth = "".join(f"{DEVKIT_IDS[photo.label]}\n" for photo in val)
    folder = "ILSVRC2012_devkit_t12"
    return tar_gz(
        [
            (f"{folder}/readme.txt", b"ImageNet Large Scale Visual Recognition Challenge 2012\n"),
            (f"{folder}/data/meta.mat", meta_mat()),
            (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ]
    )


def solution(photos: Sequence[Photo]) -> str:
    """LOC_{train,val}_solution.csv: boxes with their class, and a space after the last."""
    rows = ["ImageId,PredictionString"]
    for number, photo in enumerate(photos):
        boxes = [f"{photo.wnid} {box} " for box in ("1 2 30 40", "3 4 20 20")]
        rows.append(f"{photo.stem},{''.join(boxes[: 1 + number % 2])}")
    return "\n".join(rows) + "\n"


def write_image_folder(root: Path, photos: Sequence[Photo]) -> None:
    put_folders(root, photos, flat_val=False)


def write_image_folder_devkit(root: Path, photos: Sequence[Photo]) -> None:
    put_folders(root, photos, flat_val=True)
    put(root / DEVKIT, devkit(photos))


def write_image_folder_kaggle(root: Path, photos: Sequence[Photo]) -> None:
    put_folders(root, photos, flat_val=True)
    put(root / "LOC_val_solution.csv", solution(of_split(photos, "val")))


def write_official(root: Path, photos: Sequence[Photo]) -> None:
    train, val = of_split(photos, "train"), of_split(photos, "val")
    inner = {wnid: [(p.name, p.data) for p in train if p.wnid == wnid] for wnid in WNIDS}
    classes = [(f"{wnid}.tar", tar(members)) for wnid, members in inner.items() if members]
    put(root / "ILSVRC2012_img_train.tar", tar(classes))
    put(root / "ILSVRC2012_img_val.tar", tar((photo.name, photo.data) for photo in val))
    put(root / DEVKIT, devkit(photos))


def write_kaggle(root: Path, photos: Sequence[Photo]) -> None:
    train, val = of_split(photos, "train"), of_split(photos, "val")
    images, sets, annotations = (
        root / "ILSVRC" / kind / "CLS-LOC" for kind in ("Data", "ImageSets", "Annotations")
    )
    put_folders(images, photos, flat_val=True)
    put(images / "test" / TEST_NAME, unlabelled())
    train_paths = sorted(f"{photo.wnid}/{photo.stem}" for photo in train)
    val_paths = sorted(photo.stem for photo in val)
    for name, paths in (("train_cls.txt", train_paths), ("val.txt", val_paths)):
        put(sets / name, "".join(f"{path} {i}\n" for i, path in enumerate(paths, 1)))
    box = "<xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax>"
    for photo in val[:1]:
        put(
            annotations / "val" / f"{photo.stem}.xml",
            f"<annotation><folder>val</folder><filename>{photo.stem}</filename><object>"
            f"<name>{photo.wnid}</name><bndbox>{box}</bndbox></object></annotation>\n",
        )
    put(root / "LOC_val_solution.csv", solution(val))
    put(root / "LOC_train_solution.csv", solution(train[:5]))
    mapping = (f"{wnid} {words}\n" for wnid, words in zip(WNIDS, WORDS, strict=True))
    put(root / "LOC_synset_mapping.txt", "".join(mapping))


def write_parquet(root: Path, photos: Sequence[Photo], with_path: bool = True) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = {"names": WORDS, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": names}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )

    def put_rows(name: str, rows: Iterable[tuple[bytes, str, int]]) -> None:
        table = pa.Table.from_pylist(
            [
                {"image": {"bytes": data, "path": path if with_path else None}, "label": label}
                for data, path, label in rows
            ],
            schema,
        )
        parquet.write_table(table, root / "data" / f"{name}.parquet", row_group_size=4)

    (root / "data").mkdir()
    first, second = halves(of_split(photos, "train"))
    for name, part in (
        ("train-00000-of-00002", first),
        ("train-00001-of-00002", second),
        ("validation-00000-of-00001", of_split(photos, "val")),
    ):
        put_rows(name, ((photo.data, photo.doubled_name, photo.label) for photo in part))
    put_rows("test-00000-of-00001", [(unlabelled(), TEST_NAME, -1)])


def write_parquet_without_path(root: Path, photos: Sequence[Photo]) -> None:
    write_parquet(root, photos, with_path=False)


def write_hf_tar(root: Path, photos: Sequence[Photo]) -> None:
    first, second = halves(of_split(photos, "train"))
    for name, part in (
        ("train_images_0", first),
        ("train_images_1", second),
        ("val_images", of_split(photos, "val")),
    ):
        members = ((photo.doubled_name, photo.data) for photo in part)
        put(root / "data" / f"{name}.tar.gz", tar_gz(members))
    put(root / "data" / "test_images.tar.gz", tar_gz([(TEST_NAME, unlabelled())]))


def write_webdataset(root: Path, photos: Sequence[Photo]) -> None:
    """The layout of timm/imagenet-1k-wds; members in the order of webdataset's TarWriter."""
    splits = {
        "train": ("train-{:04d}", halves(of_split(photos, "train"))),
        "validation": ("validation-{:02d}", (of_split(photos, "val"),)),
    }
    info: dict[str, Any] = {}
    for split, (pattern, parts) in splits.items():
        names = [f"imagenet1k-{pattern.format(number)}.tar" for number in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            members: list[tuple[str, bytes]] = []
            for photo in part:
                about = {"label": photo.label, "filename": photo.name}
                members += [
                    (f"{photo.stem}.cls", str(photo.label).encode()),
                    (f"{photo.stem}.jpg", photo.data),
                    (f"{photo.stem}.json", json.dumps(about).encode()),
                ]
            put(root / name, tar(members))
        lengths = [len(part) for part in parts]
        info[split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": names,
            "shard_lengths": lengths,
        }
    put(root / "_info.json", json.dumps({"name": "imagenet1k", "splits": info}))


def write_plain_webdataset(root: Path, photos: Sequence[Photo]) -> None:
    """Numbered samples that do not say which image of ImageNet they are."""
    for split in ("train", "val"):
        members: list[tuple[str, bytes]] = []
        for number, photo in enumerate(of_split(photos, split)):
            members += [
                (f"{number:08d}.cls", str(photo.label).encode()),
                (f"{number:08d}.jpeg", photo.data),
            ]
        put(root / f"{split}-000000.tar", tar(members))


WRITERS: dict[str, Callable[[Path, Sequence[Photo]], None]] = {
    "imagefolder": write_image_folder,
    "imagefolder-devkit": write_image_folder_devkit,
    "imagefolder-kaggle": write_image_folder_kaggle,
    "official": write_official,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "parquet-nopath": write_parquet_without_path,
    "hf-tar": write_hf_tar,
    "webdataset": write_webdataset,
    "webdataset-plain": write_plain_webdataset,
}
FORMS = tuple(WRITERS)

"""Reads parquet files of labelled images, as Hugging Face distributes data sets.

All columns are checked before any file is unpacked.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from fasttrain import classes, imagenet
from fasttrain.listing import Options, Scan, is_clutter
from fasttrain.shards import ShardError
from fasttrain.splits import SPLIT_OF, one_word_each, settle_test, word_of, words
from fasttrain.spool import Job, unpack_all

if TYPE_CHECKING:
    import pyarrow

# The usual names, the likeliest first. CIFAR-100 has two label columns: fine_label is taken.
IMAGE_NAMES = "image img images picture photo jpg jpeg png webp image_bytes bytes".split()
LABEL_NAMES = (
    "label labels fine_label cls class target category y label_id class_id class_label class_name "
    "label_name species"
).split()
_MAX_FOLDERS = 32  # with more, the folders are classes, and only those named like splits are read
_NUMBERED = re.compile(r"(.*?)-(\d{5})-of-(\d{5})")
_LFS = b"version https://git-lfs"


class Columns(NamedTuple):
    """The columns of a file that are read."""

    image: str
    label: str
    is_text: bool  # labels are class names; otherwise they are integers
    names: tuple[str, ...]  # class names by number, if the file has them
    others: tuple[str, ...]  # other columns that may hold labels


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def files(root: Path) -> list[Path]:
    """Returns the parquet files in `root`, its folders, and their folders named like splits."""
    if not root.is_dir():
        return []
    folders = _folders(root)
    if len(folders) > _MAX_FOLDERS:
        folders = [path for path in folders if words(path.name) or path.name == "data"]
    inner = [path for folder in folders for path in _folders(folder) if words(path.name)]
    found = [path for folder in (root, *folders, *inner) for path in folder.glob("*.parquet")]
    return sorted(path for path in found if not (is_clutter(path.name) or _is_table(path)))


def _is_table(path: Path) -> bool:
    """Returns whether a file only describes images beside it, as img2dataset writes them."""
    return path.name == "metadata.parquet" or path.with_suffix(".tar").exists()


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_clutter(p.name))


def is_at(root: Path) -> bool:
    """Returns whether `root` holds parquet files of images, not only a table beside folders."""
    found = files(root)
    named = any(words(part) for path in found for part in path.relative_to(root).parts)
    return named or (bool(found) and not any(words(path.name) for path in _folders(root)))


def _by_split(root: Path, scan: Scan) -> dict[str, list[Path]]:
    """Returns the files of the wanted splits."""
    by_word: dict[str | None, list[Path]] = {}
    for path in files(root):
        if not path.exists():
            scan.add_dangling(path)
            continue
        by_word.setdefault(word_of(PurePosixPath(path.relative_to(root))), []).append(path)
        if any(part.startswith("partial-") for part in path.relative_to(root).parts):
            scan.say(f"WARNING: {path} is from a part of a data set, as its folder's name says")
    scan.check_links()
    nameless = by_word.pop(None, [])
    named = {str(word): paths for word, paths in by_word.items()}
    _check_one_data_set(root, [path for paths in named.values() for path in paths])
    one_word_each(named)
    found = {SPLIT_OF[word]: paths for word, paths in named.items()}
    if nameless and not found and len(scan.wanted) == 1:
        found[scan.wanted[0]] = nameless
    elif nameless:
        scan.skip("parquet files of no split by name", len(nameless))
    names = {s: [str(p.relative_to(root)) for p in paths] for s, paths in found.items()}
    found["val"] = found.get(settle_test(names, scan) or "", [])
    _check_splits(root, found, scan)
    for split in scan.wanted:
        _check_whole(found[split], scan)
    return {split: found[split] for split in scan.wanted}


def _check_one_data_set(root: Path, paths: Sequence[Path]) -> None:
    homes = sorted({_home(root, path) for path in paths})
    if len(homes) > 1:
        listed = ", ".join(f"{home}/" if home else "files in it" for home in homes[:4])
        raise ShardError(
            f"{root} holds several data sets ({listed}): name the folder of one of them, such as "
            f"{root / homes[-1]}"
        )


def _home(root: Path, path: Path) -> str:
    """Returns the folder of a file's data set, without the folder of its split."""
    folder = path.relative_to(root).parent
    return str((folder.parent if words(folder.name) else folder).as_posix()).removeprefix(".")


def _check_splits(root: Path, found: dict[str, list[Path]], scan: Scan) -> None:
    if scan.options.val_fraction is not None and found["val"]:
        raise ShardError(
            f"--val-fraction: the source has a val split already ({found['val'][0]}); leave the "
            "option out"
        )
    for split in scan.wanted:
        if not found.get(split):
            some = files(root)[0].relative_to(root)
            remedy = (
                "draw val from train with --val-fraction 0.1"
                if split == "val"
                else "make a data set to evaluate on with --val-only"
            )
            raise ShardError(
                f"{root}: no parquet file has {split} as a word in its name or in its folder's "
                f"name (found {some}); download that split too, or {remedy}"
            )


def _check_whole(paths: Sequence[Path], scan: Scan) -> None:
    """Checks that numbered files, such as train-00000-of-00294, are complete and of one export.

    Raises:
        ShardError: files of two exports are mixed, or a file is missing and that is not allowed.
    """
    exports: dict[tuple[Path, str], dict[int, Path]] = {}
    totals: dict[tuple[Path, str], tuple[int, Path]] = {}
    for path in paths:
        match = _NUMBERED.match(path.name)
        if match is None:
            continue
        export, number, total = (path.parent, match[1]), int(match[2]), int(match[3])
        own = exports.setdefault(export, {})
        first_total, first_path = totals.setdefault(export, (total, path))
        if number in own or first_total != total:
            other = own.get(number, first_path)
            raise ShardError(
                f"{other} and {path.name} are from two exports of the same data: move the files of "
                "the older one out of the source"
            )
        own[number] = path
    for export, own in exports.items():
        total, example = totals[export]
        missing = sorted(set(range(total)) - own.keys())
        if missing and not scan.options.allow_partial:
            raise ShardError(
                f"{example.parent}: {len(missing):,} of the {total:,} files like {example.name} "
                f"are missing, the first is number {missing[0]}; download them too, or do without "
                "them with --allow-partial"
            )


# --------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------


def columns_of(path: Path, options: Options) -> Columns:
    """Chooses the image and the label column of a file. Checks its schema and statistics.

    Raises:
        ShardError: the file is damaged, a column is missing, has another type, or holds nulls.
    """
    from pyarrow import parquet, types

    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ShardError(f"{path} is a Git LFS pointer, not the data: run git lfs pull")
    try:
        with parquet.ParquetFile(path) as table:
            schema, metadata = table.schema_arrow, table.metadata
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        raise ShardError(f"{path} is damaged: {error}; download it again") from None
    features = _features(schema)
    image = _image_column(path, schema, options.image_column)
    label = _label_column(path, schema, features, image, options.label_column)
    is_text = _is_text(path, schema.field(label))
    kind = schema.field(image).type
    if types.is_struct(kind) and types.is_null(kind.field("bytes").type):
        raise ShardError(_no_bytes(path, image, "any row"))
    _check_values(path, metadata, image, label)
    names = () if is_text else tuple(features.get(label, {}).get("names") or ())
    others = tuple(column for column in _named(schema, LABEL_NAMES) if column != label)
    return Columns(image, label, is_text, names, others)


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """Returns what Hugging Face's libraries store about columns; empty if nothing is stored."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: value for name, value in found.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _listed(schema: "pyarrow.Schema") -> str:
    fields = [f"{field.name} ({field.type})"[:60] for field in schema]
    return ", ".join(fields[:8]) + (", ..." if len(fields) > 8 else "")


def _named(schema: "pyarrow.Schema", names: Sequence[str]) -> list[str]:
    """Returns the columns with one of these names, in the order of `names`. Ignores case."""
    own = {column.lower(): column for column in reversed(schema.names)}
    return [own[name] for name in names if name in own]


def _chosen(path: Path, schema: "pyarrow.Schema", option: str, name: str) -> str:
    if name not in schema.names:
        raise ShardError(f"{path} has no column {name} ({option}), only {_listed(schema)}")
    return name


def _image_column(path: Path, schema: "pyarrow.Schema", name: str | None) -> str:
    usable = [field.name for field in schema if _holds_bytes(field.type)]
    if name is not None:
        name = _chosen(path, schema, "--image-column", name)
    elif len(usable) == 1:
        return usable[0]
    else:
        found = _named(schema, IMAGE_NAMES)
        name = next((column for column in found if column in usable), found[0] if found else None)
    if name is None:
        raise ShardError(
            f"{path}: none of the columns {_listed(schema)} is known to hold images: name a column "
            "with --image-column; it must hold bytes, or bytes and path"
        )
    if name not in usable:
        raise ShardError(
            f"{path}: column {name} is {schema.field(name).type}; expected the bytes of image "
            "files (binary, or a struct of bytes and path): name another with --image-column, or "
            "make the file again with the images in it"
        )
    return name


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index < 0:
            return False
        inner = kind.field(index).type
        return _is_binary(inner) or types.is_null(inner)  # null if no row has bytes
    return _is_binary(kind)


def _is_binary(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    checks = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _label_column(
    path: Path,
    schema: "pyarrow.Schema",
    features: dict[str, dict[str, Any]],
    image: str,
    name: str | None,
) -> str:
    if name is not None:
        return _chosen(path, schema, "--label-column", name)
    marked = [n for n, about in features.items() if about.get("_type") == "ClassLabel"]
    marked = [column for column in marked if column in schema.names]
    known = [column for column in _named(schema, LABEL_NAMES) if column != image]
    found = known or (marked if len(marked) == 1 else [])
    if not found:
        raise ShardError(
            f"{path}: none of the columns {_listed(schema)} is known to hold labels: name a column "
            "with --label-column; it must hold whole numbers or names of classes"
        )
    return found[0]


def _is_text(path: Path, field: "pyarrow.Field") -> bool:
    """Returns True if labels are text, and False if they are integers.

    Raises:
        ShardError: the column has another type.
    """
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_string(kind) or types.is_large_string(kind):
        return True
    if types.is_integer(kind) or types.is_boolean(kind):
        return False
    raise ShardError(
        f"{path}: column {field.name} is {field.type}; expected whole numbers or names of classes: "
        "name another with --label-column, or make the file again with int64 or string labels"
    )


def _check_values(path: Path, metadata: Any, image: str, label: str) -> None:
    """Raises ShardError if the file's statistics report nulls or negative labels."""
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        for column in (about.column(number) for number in range(about.num_columns)):
            found = column.statistics
            if found is None or not found.has_null_count:
                continue
            if column.path_in_schema in (image, f"{image}.bytes") and found.null_count:
                raise ShardError(_no_bytes(path, image, f"{found.null_count:,} rows"))
            if column.path_in_schema != label:
                continue
            if found.null_count:
                raise ShardError(_no_label(path, label, f"{found.null_count:,} rows"))
            if found.has_min_max and isinstance(found.min, int) and found.min < 0:
                raise ShardError(
                    f"{path}: column {label} holds {found.min}, which means no label: replace it "
                    "by a file that has labels (for ImageNet: validation-*.parquet)"
                )


def _no_bytes(path: Path, column: str, where: str) -> str:
    return (
        f"{path}: column {column} has no bytes in {where}: the images are not in the file; make it "
        "again with them (datasets: embed_table_storage, push_to_hub), or give the folder of images"
    )


def _no_label(path: Path, column: str, where: str) -> str:
    return (
        f"{path}: column {column} is null or empty in {where}: images without a label cannot be "
        "used; remove those rows, or name another column with --label-column"
    )


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def read(job: Job) -> Iterator[tuple[str, int | str, bytes]]:
    """Yields name, label and bytes of every image of a file.

    Args:
        job: its columns are the image column and the label column.
    Raises:
        ShardError: a row has no image or no label.
    """
    from pyarrow import parquet

    image, label = job.columns
    row = 0
    with parquet.ParquetFile(job.path) as file:
        for batch in file.iter_batches(batch_size=64, columns=[image, label]):
            for item in batch.to_pylist():
                data, path = item[image], None
                if isinstance(data, dict):
                    data, path = data["bytes"], data.get("path")
                if data is None:
                    raise ShardError(_no_bytes(job.path, image, f"row {row:,}"))
                found = item[label]
                if found is None or found == "":
                    raise ShardError(_no_label(job.path, label, f"row {row:,}"))
                name = Path(path).name if path else f"{job.path.stem}-{row:06d}"
                number = found if isinstance(found, str) else int(found)  # booleans too
                yield imagenet.undoubled(name), number, data
                row += 1


def scan_parquet(root: Path, scan: Scan) -> None:
    """Unpacks and lists the images of parquet files. Text labels are class names.

    Raises:
        ShardError: pyarrow is missing, or a file or a column cannot be used.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ShardError(
            "pyarrow reads parquet files, but is missing: pip install -e '.[sources]'"
        ) from None
    jobs: list[Job] = []
    chosen: list[tuple[Path, Columns]] = []
    for split, paths in _by_split(root, scan).items():
        for path in paths:
            columns = columns_of(path, scan.options)
            chosen.append((path, columns))
            _check_same(chosen[0], chosen[-1])
            name = path.relative_to(root).as_posix()
            jobs.append(Job(root, name, split, (columns.image, columns.label)))
    columns = chosen[0][1]
    text = f"images are in the column {columns.image}, labels in {columns.label}"
    if columns.others:
        text += f" (choose {' or '.join(columns.others)} with --label-column)"
    scan.say(text)
    found = unpack_all(jobs, read, scan)
    listed = classes.find_list(root, scan)
    if columns.is_text:
        for split, images in found.items():
            scan.splits[split] += [item._replace(label=str(label)) for item, label in images]
        scan.classes = listed
        return
    wnids = classes.known_wnids(pair for images in found.values() for pair in images)
    labels = {label for images in found.values() for _, label in images}
    if listed is None and not labels <= wnids.keys():
        listed = next((known.names for _, known in chosen if known.names), None)
    classes.name_numbers(scan, found, wnids, listed)


def _check_same(first: tuple[Path, Columns], other: tuple[Path, Columns]) -> None:
    """Checks that labels mean the same in two files. Raises ShardError if they do not."""
    (path, columns), (other_path, others) = first, other
    if columns.is_text != others.is_text:
        kinds = ["text" if found.is_text else "numbers" for found in (columns, others)]
        raise ShardError(
            f"{path}: column {columns.label} holds {kinds[0]}, but {others.label} of {other_path} "
            f"holds {kinds[1]}: labels must be all numbers or all names of classes; make one of "
            "the files again"
        )
    if columns.names and others.names and columns.names != others.names:
        raise ShardError(
            f"{path} and {other_path} give different class names to the same numbers, so they are "
            "from different data sets; download both from one data set"
        )

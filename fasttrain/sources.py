"""Recognises the form of a source of labelled images, and lists its images.

Every form gives the same listing: images named `class/file` in sorted order, each with its label
and the location of its bytes. So the same photographs give the same shards in any form. The label
of a class is its position among the sorted class names. For ImageNet these are the WordNet ids. A
list of classes may give another order.

Nothing from a source is executed, unpickled or extracted, and no name in it becomes a path.
"""

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fasttrain import classes, folders, imagenet, listing, parquet, splits, spool, wds
from fasttrain.archives import MAX_IMAGE_BYTES
from fasttrain.listing import DEFAULTS, Options, Scan, Source
from fasttrain.shards import SPLITS, ShardError
from fasttrain.spool import Run

# --------------------------------------------------------------------------------------------------
# Forms without random access, which are unpacked first
# --------------------------------------------------------------------------------------------------


def _check_splits(root: Path, jobs: Sequence[spool.Job], scan: Scan) -> None:
    """Checks that no split is missing, because unpacking the other one can take hours."""
    for split in scan.wanted:
        if not any(job.split == split for job in jobs):
            raise ShardError(
                f"{root}: there are no files of {split}, only of other splits ({jobs[0].name}); "
                f"download those of {split} too"
            )


def _read_tar_gz(job: spool.Job) -> Iterator[tuple[str, str, bytes]]:
    path = job.path
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            if not (member.isreg() and listing.is_image(member.name)):
                continue
            doubled = re.search(r"_(n\d{8})\.\w+$", member.name)
            if doubled is None or member.size > MAX_IMAGE_BYTES:
                raise ShardError(
                    f"{path}: {member.name!r}: expected a class at the end of the name, as in "
                    "n01440764_10026_n01440764.JPEG, and less than a gigabyte"
                )
            file = tar.extractfile(member)
            assert file is not None
            yield imagenet.undoubled(Path(member.name).name), doubled[1], file.read()


def _scan_hf_tar(root: Path, scan: Scan) -> None:
    """Lists Hugging Face's older form: train_images_*.tar.gz and val_images.tar.gz."""
    folder = root if [*root.glob("train_images*.tar.gz")] else root / "data"
    jobs = [
        spool.Job(folder, path.name, split)
        for split in SPLITS
        for path in sorted(folder.glob(f"{split}_images*.tar.gz"))
    ]
    scan.skip("files of other splits", len([*folder.glob("test_images*.tar.gz")]))
    _check_splits(root, jobs, scan)
    jobs = [job for job in jobs if job.split in scan.wanted]
    for split, found in spool.unpack_all(jobs, _read_tar_gz, scan).items():
        scan.splits[split] += [item._replace(label=label) for item, label in found]


# --------------------------------------------------------------------------------------------------
# All forms
# --------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A form of source."""

    description: str  # for the user
    sign: str  # the files by which it is recognised, for the user
    is_at: Callable[[Path], bool]  # recognises the form in a folder
    scan: Callable[[Path, Scan], None]  # lists the images


def _is_official(root: Path) -> bool:
    """Returns whether both archives are there, or one without an ImageFolder beside it."""
    both = (root / imagenet.TRAIN_TAR).exists() and (root / imagenet.VAL_TAR).exists()
    return both or (imagenet.is_official(root) and not folders.is_at(root))


FORMS = {
    "official": Form(
        "the official archives",
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
        _is_official,
        imagenet.scan_official,
    ),
    "kaggle": Form(
        "Kaggle's download",
        "ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv",
        lambda root: folders.kaggle_images(root).is_dir(),
        folders.scan_kaggle,
    ),
    "parquet": Form(
        "Hugging Face parquet files",
        "parquet files with train and validation in their names or folders",
        parquet.is_at,
        parquet.scan_parquet,
    ),
    "hf-tar": Form(
        "Hugging Face archives",
        "train_images_*.tar.gz and val_images.tar.gz, here or in data/",
        lambda root: any(root.glob("train_images*.gz")) or any(root.glob("data/train_images*.gz")),
        _scan_hf_tar,
    ),
    "imagefolder": Form(
        "an ImageFolder",
        "train/<class>/ and val/<class>/, or val/ flat beside the devkit or LOC_val_solution.csv; "
        "or <class>/ alone",
        folders.is_at,
        folders.scan_imagefolder,
    ),
    "webdataset": Form(
        "WebDataset tars",
        "tars of <key>.jpg and <key>.cls, with train and val in their names or folders",
        wds.is_at,
        wds.scan_webdataset,
    ),
}


UNPACKED = ("parquet", "hf-tar")  # forms without random access


def recognise(root: Path) -> str:
    """Returns the form of the source at `root`, a key of `FORMS`.

    Raises:
        ShardError: no form is recognised. The message lists all forms.
    """
    if root.is_dir():
        _check_arrow(root)
        for name, form in FORMS.items():
            if form.is_at(root):
                return name
        for path in folders.children(root):
            _check_arrow(path)
            if any(form.is_at(path) for form in FORMS.values()):
                raise ShardError(
                    f"{root} holds none of the forms that are recognised; did you mean {path}?"
                )
        if packed := wds.packed(root):
            raise ShardError(wds.fault_of_packed(packed[0]))
        if zipped := sorted(root.glob("*.zip")):
            raise ShardError(
                f"{zipped[0]} is compressed and does not allow random access; unpack it first"
            )
    missing = "\n".join(f"  {name}: {f.description}: {f.sign}" for name, f in FORMS.items())
    what = "holds none of the forms that are recognised" if root.is_dir() else "is not a folder"
    if root.parent.is_dir() and not root.is_dir() and (root.exists() or set("{*") & set(root.name)):
        what += f"; name the folder that holds the files ({root.parent})"
    raise ShardError(f"{root} {what}:\n{missing}")


def _check_arrow(root: Path) -> None:
    """Raises ShardError if `root` holds Arrow files of Hugging Face's datasets, not parquet."""
    homes = [root, *(path for path in folders.children(root) if splits.words(path.name))]
    found = next((path for home in homes for path in sorted(home.glob("*.arrow"))), None)
    if found is None:
        return
    if (found.parent / "state.json").exists():
        what, load = "what save_to_disk of Hugging Face's datasets writes", "load_from_disk"
        is_dict = found.parent != root
        write = "[d.to_parquet(f'NEW/{s}.parquet') for s, d in data.items()]"
        write = write if is_dict else "data.to_parquet('NEW/train.parquet')"
        then = "give the folder NEW" + ("" if is_dict else " with --val-fraction 0.1")
        command = f"from datasets import {load}; data = {load}({str(root)!r}); {write}"
        remedy = f'make parquet files of it:\n    python -c "{command}"\nthen {then}'
    else:
        what = "the cache of Hugging Face's datasets"
        remedy = "save each split that you load as a file: data.to_parquet('NEW/train.parquet')"
    raise ShardError(f"{root} holds {what} ({found.name}), which is not read: {remedy}")


def scan(
    root: Path,
    form: str,
    spool: Path,
    run: Run,
    say: Callable[[str], None],
    options: Options = DEFAULTS,
) -> Source:
    """Lists the images of a source.

    Args:
        form: a key of `FORMS`.
        spool: folder for files that must be unpacked first.
        run: runs tasks in parallel and returns their results.
        say: prints a line for the user.
        options: the user's choices.
    Raises:
        ShardError: a split, a class or a label is missing, a link is broken, or an archive is
            damaged.
    """
    if not root.is_dir():
        raise ShardError(f"{root} is not a folder")
    found = Scan(spool, run, say, options)
    FORMS[form].scan(root, found)
    found.check_links()
    if found.dangling:
        say(f"WARNING: {found.describe_dangling()}; they are left out")
    for split in found.wanted:
        if not found.splits[split]:
            raise ShardError(f"{root}: no images of {split} were found")
    if options.val_fraction is not None:
        train, val = splits.hold_out(found.splits["train"], options.val_fraction, options.seed)
        found.splits = {"train": train, "val": val}
        if not val:
            raise ShardError(
                f"--val-fraction: every class of {root} has a single image, so none can be drawn; "
                "add images"
            )
    if options.val_only:
        found.splits = {"val": found.splits["val"]}
    ordered = classes.settle(root, found)
    labels = {name: label for label, name in enumerate(ordered)}
    made = {split: listing.make_listing(images, labels) for split, images in found.splits.items()}
    return Source(form, ordered, made, +found.skipped, found.archives)


def archives(root: Path, form: str, options: Options) -> str:
    """Returns a digest of the files that must be unpacked; empty for forms read in place."""
    if form not in UNPACKED:
        return ""
    found = Scan(options=options)
    FORMS[form].scan(root, found)
    return found.archives

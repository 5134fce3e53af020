"""Shards follow the format on disk, other libraries read them, and damage gives a message."""

import io
import json
import shutil
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import listed, photograph, run, shard
from PIL import Image
from shard_files import expected_samples, files_of

from fasttrain import config, files, sampling, sharding, shards
from fasttrain.schedule import make_plan
from fasttrain.sharding import Policy, Progress
from fasttrain.shards import ShardError


def test_the_command_writes_the_same_bytes_with_any_number_of_workers(
    folder: Path, tmp_path: Path
) -> None:
    results = []
    for workers in ("1", "3"):
        out = tmp_path / workers
        done = run(["python", "tools/make_shards.py", folder, out, "--workers", workers])
        results.append(json.loads(done.stdout.splitlines()[-1]))
        assert "an ImageFolder (imagefolder)" in done.stderr
        assert "3 classes, 45 images in train, 13 images in val" in done.stderr
        assert "sharding 58/58" in done.stderr
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    assert results[0]["out"] == str(tmp_path / "1") and results[0]["seconds"] > 0
    counts = {"rejected": 0, "repaired": 0}
    assert results[0]["splits"] == {
        "train": {"samples": 45, "shards": 1, **counts},
        "val": {"samples": 13, "shards": 1, **counts},
    }


def test_processes_write_the_same_bytes(folder: Path, dataset: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    shard(folder, tmp_path, workers=2, shard_size=11, on_progress=seen.append)
    assert files_of(tmp_path) == files_of(dataset)
    assert sum(done.images for done in seen) == 58
    tars = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert sum(done.num_bytes for done in seen) == tars


def test_shards_are_balanced_and_shuffled(folder: Path, dataset: Path) -> None:
    manifest = shards.read_manifest(dataset)
    assert [s["num_samples"] for s in manifest["splits"]["train"]["shards"]] == [11, 11, 11, 12]
    assert manifest["classes"] == ["a", "b", "c"]
    labels = shards.open_split(dataset, "train").label.tolist()
    assert sorted(labels) == [0] * 15 + [1] * 15 + [2] * 15
    assert labels != sorted(labels)


def test_the_index_gives_the_location_of_every_image(folder: Path, dataset: Path) -> None:
    for name in shards.SPLITS:
        split = shards.open_split(dataset, name)
        originals = {p.read_bytes(): p for p in (folder / name).rglob("*.jpg")}
        for sample in range(split.num_samples):
            tar = split.shard_paths[split.shard[sample]].read_bytes()
            offset, size = int(split.offset[sample]), int(split.size[sample])
            data = tar[offset : offset + size]
            original = originals.pop(data)
            assert split.classes[split.label[sample]] == original.parent.name
            assert zlib.crc32(data) == split.crc32[sample]
            size_px = (int(split.width[sample]), int(split.height[sample]))
            assert Image.open(io.BytesIO(data)).size == size_px
        assert not originals


def test_members_are_plain_ustar(dataset: Path) -> None:
    with tarfile.open(dataset / "train-000001.tar") as tar:
        members = tar.getmembers()
        assert tar.pax_headers == {}
    assert [m.name for m in members[:4]] == [
        *("000000011.jpg", "000000011.cls", "000000012.jpg", "000000012.cls")
    ]
    assert {(m.mtime, m.uid, m.gid, m.type) for m in members} == {(0, 0, 0, tarfile.REGTYPE)}
    assert (
        shards.open_split(dataset, "train")
        .describe(12)
        .endswith("train-000001.tar, key 000000012 at byte " + str(members[2].offset_data))
    )


def test_the_webdataset_library_reads_the_shards(dataset: Path) -> None:
    import webdataset

    urls = [str(p) for p in sorted(dataset.glob("train-*.tar"))]
    found = [
        (int(sample["cls"]), sample["jpg"])
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    ]
    assert found == expected_samples(dataset, "train")


def test_timm_reads_the_shards(dataset: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.data.readers.reader_wds import ReaderWds

    reader = ReaderWds(
        root=str(dataset), split="train-{000000..000003}.tar", num_samples=45, is_training=False,
        batch_size=1,
    )  # fmt: skip
    found = [(int(label), image.convert("RGB").tobytes()) for image, label in reader]
    assert sorted(found) == sorted(
        (label, Image.open(io.BytesIO(data)).convert("RGB").tobytes())
        for label, data in expected_samples(dataset, "train")
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_dalis_webdataset_reader_reads_the_shards(dataset: Path, indexed: bool) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    tars = [str(p) for p in sorted(dataset.glob("train-*.tar"))]
    indices: dict[str, Any] = (
        {"index_paths": [t.replace(".tar", ".idx") for t in tars]} if indexed else {}
    )

    @pipeline_def(batch_size=45, num_threads=1, device_id=None)
    def pipeline() -> Any:
        pair: Any = fn.readers.webdataset(
            paths=tars, ext=["jpg", "cls"], missing_component_behavior="error", **indices
        )
        return pair[0], pair[1]

    outputs = pipeline().run()
    assert outputs
    images, labels = outputs
    # One width for all labels: a DALI pipeline can turn the four digits into a number.
    digits = np.asarray(labels.as_tensor()) - ord("0")
    found = [
        (int(label @ [1000, 100, 10, 1]), bytes(np.asarray(image)))
        for image, label in zip(images, digits, strict=True)
    ]
    assert found == expected_samples(dataset, "train")


def test_bad_images_are_rejected_and_odd_ones_repaired(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    rng = np.random.default_rng(1)
    for split in shards.SPLITS:
        for name in "ab":
            (source / split / name).mkdir(parents=True)
            photograph(rng, 60, 40).save(source / split / name / "good.jpg")
    train = source / "train" / "a"
    whole = (train / "good.jpg").read_bytes()
    (train / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "text.jpg").write_text("not an image")
    (train / "empty.JPEG").write_bytes(b"")
    (train / "notes.txt").write_text("not listed as an image")
    photograph(rng, 50, 30).save(train / "png.jpg", "PNG")
    photograph(rng, 50, 30).convert("CMYK").save(train / "cmyk.jpg")
    done = run(["python", "tools/make_shards.py", source, out])
    result = json.loads(done.stdout.splitlines()[-1])["splits"]
    assert result["train"] == {"samples": 4, "shards": 1, "rejected": 3, "repaired": 2}
    assert result["val"] == {"samples": 2, "shards": 1, "rejected": 0, "repaired": 0}
    for text in (
        "left out 1 file: 1 *.txt",
        "rejected train/a/truncated.jpg: ",
        "rejected train/a/text.jpg: not an image",
        "rejected train/a/empty.JPEG: not an image",
        "re-encoded train/a/cmyk.jpg: was JPEG CMYK",
        "re-encoded train/a/png.jpg: was PNG RGB",
    ):
        assert text in done.stderr
    entry = shards.read_manifest(out)["splits"]["train"]
    assert {item["name"] for item in entry["repaired"]} == {"train/a/cmyk.jpg", "train/a/png.jpg"}
    for _, data in expected_samples(out, "train"):
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_a_shard_may_lose_all_its_images(folder: Path, tmp_path: Path) -> None:
    source, out = Path(shutil.copytree(folder, tmp_path / "source")), tmp_path / "out"
    before = shard(source, tmp_path / "before", shard_size=1)
    first = shards.open_split(tmp_path / "before", "train")
    image = expected_samples(tmp_path / "before", "train")[7][1]
    assert before and first.shard[7] == 7
    (path,) = (path for path in source.rglob("*.jpg") if path.read_bytes() == image)
    path.write_bytes(b"no image")
    shard(source, out, shard_size=1)
    split = shards.open_split(out, "train")
    assert split.num_samples == 44 and split.shard_samples[6:9] == (1, 0, 1)
    data = config.Data(shuffle="blocks", shuffle_shards=1)
    order = sampling.epoch_order(0, 0, split, 1)
    assert sorted(order.tolist()) == list(range(44))
    plan = make_plan(config.Train(epochs=2, global_batch_size=4), config.Optim(), 44, 1)
    for step in range(11):
        pieces = sampling.pieces_ahead(split, data, plan, step, 0, step == 0)
        assert all(0 <= piece.start <= piece.stop for piece in pieces)


def test_a_member_with_an_unreadable_name_is_described(dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    split = shards.open_split(root, "train")
    path, header = split.shard_paths[0], int(split.offset[2]) - 512
    data = bytearray(path.read_bytes())
    data[header] = 0xFF
    data[header + 148 : header + 156] = (
        b"%06o\0 "
        % tarfile.calc_chksums(  # type: ignore[attr-defined]
            data[header : header + 512]
        )[0]
    )
    path.write_bytes(data)
    assert split.describe(2) == f"{path}, key unreadable at byte {header + 512}"


def test_a_part_of_a_finished_data_set_has_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    """If an array has more jobs than shards, some jobs begin when all is done."""
    out, command = tmp_path / "out", ["python", "tools/make_shards.py", folder, tmp_path / "out"]
    assert shard(folder, out)
    before = files_of(out)
    late = run([*command, "--part", "7/8"])
    assert json.loads(late.stdout.splitlines()[-1])["splits"]["train"]["samples"] == 45
    other = run([*command, "--part", "7/8", "--seed", "1"], code=2)
    assert "already holds another finished data set" in other.stderr
    assert files_of(out) == before


def test_an_unfinished_data_set_is_finished(folder: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    (out / shards.MANIFEST).unlink()
    with pytest.raises(ShardError, match=r"holds files that fasttrain did not write \(train[-.]"):
        shard(folder, out, shard_size=11)
    with pytest.raises(ShardError, match="no data set at"):
        shards.open_split(out, "train")
    shutil.rmtree(out)
    sharding.claim(out, listed(folder), Policy(), 0, 11)
    (out / f"train-000002.tar.node-99{files.TEMPORARY}").write_bytes(b"half a shard")
    with pytest.raises(ShardError, match=r"begun with other options:\n  seed: 0 -> 1\n"):
        shard(folder, out, shard_size=11, seed=1)
    shard(folder, out, shard_size=11)
    assert files_of(out) == files_of(dataset)


def test_a_folder_that_is_no_data_set_is_refused(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    def fault(root: Path) -> str:
        with pytest.raises(ShardError) as error:
            shards.read_manifest(root)
        return str(error.value)

    empty, copy = tmp_path / "empty", tmp_path / "copy"
    empty.mkdir()
    for root in (empty, tmp_path / "nowhere"):
        assert fault(root) == (
            f"no data set at {root} (looked for {root / 'manifest.json'}); make one with\n"
            f"    python tools/make_shards.py /path/to/imagenet {root}\n"
            "or give the folder of existing shards (for train.py: --set data.root=/path/to/shards)"
        )
    assert fault(folder) == (
        f"{folder} holds no shards of fasttrain, but train/, val/; if those are photographs, make "
        f"shards of them in another folder with\n"
        f"    python tools/make_shards.py {folder} data/NAME\n"
        "and give that folder instead (for train.py: --set data.root=data/NAME)"
    )
    assert fault(dataset.parent).endswith(
        f"but there is one at {dataset}; give that folder instead"
    )
    shutil.copytree(dataset, copy)
    (copy / shards.MANIFEST).unlink()
    assert "it holds shards, but manifest.json is missing; copy that file too" in fault(copy)
    sharding.claim(tmp_path / "begun", listed(folder), Policy(), 0, 11)
    assert fault(tmp_path / "begun").endswith(
        "begun is not finished: run the command that began it again (make_shards.py)"
    )


def test_unusable_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    flat, unknown, no_val, empty = copy("flat"), copy("unknown"), copy("no_val"), copy("empty")
    (flat / "val" / "a" / "003.jpg").rename(flat / "val" / "ILSVRC2012_val_00000001.JPEG")
    (unknown / "val" / "a").rename(unknown / "val" / "z")
    shutil.rmtree(no_val / "val")
    (empty / "train" / "d").mkdir()
    for root, message in (
        (flat, "ILSVRC2012_val_00000001.JPEG is outside any class folder"),
        (unknown, "val holds images of z, a class that train does not have"),
        (no_val, "there is no folder val/"),
        (empty, "holds no images; remove the class or fill it"),
        (tmp_path / "nowhere", "nowhere is not a folder"),
        (tmp_path, "holds none of the forms that are recognised"),
    ):
        with pytest.raises(ShardError, match=message):
            listed(root)
    failed = run(["python", "tools/make_shards.py", no_val, tmp_path / "out"], code=2)
    assert "expected train/<class>/ and val/<class>/" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_damage_is_named(dataset: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(dataset, tmp_path / name))

    short = damaged("short")
    (short / "train-000002.tar").write_bytes((dataset / "train-000002.tar").read_bytes()[:-512])
    gone = damaged("gone")
    (gone / "train-000001.tar").unlink()
    header = damaged("header")
    data = bytearray((header / "train.index").read_bytes())
    data[3] ^= 1
    (header / "train.index").write_bytes(data)
    lying = damaged("lying")
    data = bytearray((lying / "train.index").read_bytes())
    data[33] = 0xFF  # in the first offset: far past the end of the tar
    (lying / "train.index").write_bytes(data)
    version = damaged("version")
    manifest = json.loads((version / shards.MANIFEST).read_text()) | {"version": 99}
    (version / shards.MANIFEST).write_text(json.dumps(manifest))
    torn = damaged("torn")
    (torn / shards.MANIFEST).write_text("{")
    for root, message in (
        (short, r"train-000002.tar has [\d,]+ bytes, but manifest.json says [\d,]+"),
        (gone, "train-000001.tar: No such file or directory, but manifest.json lists it"),
        (header, "train.index is damaged or of another version"),
        (lying, "train.index is damaged"),
        (version, "has format version 99, but this fasttrain reads 1"),
        (torn, "manifest.json is damaged"),
    ):
        with pytest.raises(ShardError, match=message):
            shards.open_split(root, "train")


def test_imagenet_opens_in_no_time_and_little_memory(tmp_path: Path) -> None:
    """1,281,167 samples in 1,281 tars, here sparse files, opened by a process of its own."""
    count, per_shard = 1_281_167, 1000
    number = np.arange(count)
    rows = np.stack([number % per_shard * 1024, *[number * 0 + n for n in (512, 0)]], 1)
    rows = np.concatenate([rows, np.stack([number // per_shard, number % 1000], 1)], 1)
    rows = np.concatenate([rows, np.full((count, 2), 500)], 1)
    entries = []
    for place in range(-(-count // per_shard)):
        path = tmp_path / f"train-{place:06d}.tar"
        with path.open("wb") as file:
            file.truncate(1024 * per_shard)
        there = min(per_shard, count - place * per_shard)
        size = 1024 * per_shard
        entry = {"name": path.name, "size": size, "num_samples": there}
        entries.append(entry | dict.fromkeys(("sha256", "idx_sha256"), "0" * 64))
    index = shards.write_index(tmp_path / "train.index", [rows])
    entry = {"num_samples": count, "index": index, "shards": entries}
    policy = {"short_side": None, "store": "jpeg"}
    classes = [str(n) for n in range(1000)]
    manifest = {"version": 1, "classes": classes, "policy": policy, "splits": {"train": entry}}
    shards.write_manifest(tmp_path, manifest)
    code = (
        "import resource, time; from pathlib import Path; from fasttrain import shards;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before, start = peak(), time.perf_counter();"
        f"split = shards.open_split(Path({str(tmp_path)!r}), 'train');"
        "print(time.perf_counter() - start, (peak() - before) / 1024, split.num_samples)"
    )
    seconds, mib, samples = run([sys.executable, "-c", code]).stdout.split()
    assert int(samples) == count
    assert float(mib) < 100
    assert float(seconds) < 1  # 0.05 s on an idle machine

"""verify_shards.py finds any change to a data set, and names the file."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import verify_shards
from conftest import run

from fasttrain import shards


def verify(root: Path, decode: bool = False) -> list[verify_shards.Finding]:
    return verify_shards.verify(root, decode, workers=1)[0]


def test_a_good_data_set_has_no_findings(dataset: Path) -> None:
    done = run(["python", "tools/verify_shards.py", dataset])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["samples"] == 58 and result["findings"] == []


def test_any_flipped_byte_is_found_and_its_file_named(copied: Path) -> None:
    """Twenty bytes of every file and a hundred other bytes are flipped, some 350 in all."""
    draw = random.Random(0)
    files = sorted(copied.iterdir())
    places = [(path, draw.randrange(path.stat().st_size)) for path in files for _ in range(20)]
    sizes = [path.stat().st_size for path in files]
    for path in draw.choices(files, sizes, k=100):
        places.append((path, draw.randrange(path.stat().st_size)))
    for path, place in places:
        with path.open("r+b") as file:
            file.seek(place)
            (before,) = file.read(1)
            file.seek(place)
            file.write(bytes([before ^ (1 << draw.randrange(8))]))
        found = verify(copied)
        assert found, f"byte {place} of {path.name}"
        named = {finding.place for finding in found}
        expected = {path.name, shards.MANIFEST} if "manifest" in path.name else {path.name}
        assert named & expected, f"byte {place} of {path.name}: {found}"
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([before]))
    assert verify(copied) == []


def test_missing_and_truncated_files_are_named(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert verify(copied), path.name
        path.unlink()
        assert verify(copied), path.name
        path.write_bytes(content)
    assert verify(copied) == []


def test_a_wrong_label_is_found(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index has a right digest and a wrong label, as a faulty writer would leave it."""
    good = shards.open_split(copied, "val")
    label = good.label.copy()
    label[4] = (label[4] + 1) % 3
    monkeypatch.setattr(shards, "open_split", lambda *_: dataclasses.replace(good, label=label))
    findings = [finding for finding in verify(copied) if finding.place == "val-000000.tar"]
    assert [finding.fault for finding in findings] == [
        f"byte {int(good.offset[4])}: label '{int(good.label[4]):04d}' in the tar, "
        f"{int(label[4])} in the index"
    ]


def test_command_line_names_the_shard(copied: Path) -> None:
    split = shards.open_split(copied, "train")
    path = split.shard_paths[2]
    content = bytearray(path.read_bytes())
    (sample,) = [s for s in range(45) if split.shard[s] == 2][:1]
    content[int(split.offset[sample]) + 300] ^= 1
    path.write_bytes(content)
    failed = run(["python", "tools/verify_shards.py", copied, "--quick"], code=1)
    result = json.loads(failed.stdout.splitlines()[-1])
    assert {finding["place"] for finding in result["findings"]} == {"train-000002.tar"}
    assert "sha256 is not the manifest's" in failed.stderr
    assert any(
        finding["fault"].startswith(f"byte {int(split.offset[sample])}: the image's crc32")
        for finding in result["findings"]
    )
    nothing = run(["python", "tools/verify_shards.py", copied / "nowhere"], code=1)
    assert "no data set at" in nothing.stdout

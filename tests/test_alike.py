"""Processes that do not belong to one run are refused when they join."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO

from fasttrain import alike, digests
from fasttrain.config import Recipe
from fasttrain.launch import LaunchError
from fasttrain.runtime import Process


def found(number: int = 3) -> list[dict[str, Any]]:
    device = torch.device("cpu")
    return [
        alike.facts(Process(rank, number, device, 1, 1), Recipe(), ("a" * 64, "b" * 64))
        for rank in range(number)
    ]


def test_processes_that_are_alike_may_train_together() -> None:
    alike.check(found())
    several = [one | {"gpu": f"GPU-{rank}"} for rank, one in enumerate(found())]
    alike.check(several)
    alike.check(found(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fasttrain's code": "0123"}, "fasttrain's code: 0123 for rank 2 on "),
        ({"train.epochs": 90}, "train.epochs: 90 for rank 2 on .*, but rank 0 on .*: 150"),
        ({"train.micro_batch_size": 3}, "train.micro_batch_size: 3 for rank 2"),
        ({"the data set": ["c", "d"]}, r"the data set: \['c', 'd'\] for rank 2"),
        ({"torch": "2.10.0"}, "torch: 2.10.0 for rank 2"),
        ({"gpu": "GPU-0"}, "rank 2 on .* has the GPU of rank 0 on .*: launch one process per GPU"),
        ({"clock": 0.0}, r"the clock of rank 2 on .* is -\d+ s from that of rank 0 on"),
    ],
)
def test_processes_that_differ_are_refused(change: dict[str, Any], message: str) -> None:
    some = copy.deepcopy(found())
    some[0]["gpu"], some[1]["gpu"] = "GPU-0", "GPU-1"
    some[2] |= change
    with pytest.raises(LaunchError, match=message):
        alike.check(some)


def test_the_digest_of_the_code_covers_every_module_also_in_sub_folders(tmp_path: Path) -> None:
    package = tmp_path / "fasttrain"
    shutil.copytree(REPO / "fasttrain", package, ignore=shutil.ignore_patterns("__pycache__"))
    found = digests.code_digest(package)
    assert found == digests.code_digest()
    (package / "README.md").write_text("no code")
    assert digests.code_digest(package) == found
    (package / "shards").mkdir()
    (package / "shards" / "forms.py").write_text("X = 1\n")
    deeper = digests.code_digest(package)
    (package / "shards" / "forms.py").write_text("X = 2\n")
    changed = digests.code_digest(package)
    (package / "shards" / "forms.py").rename(package / "shards" / "other.py")
    assert len({found, deeper, changed, digests.code_digest(package)}) == 4
    for path in sorted(package.glob("*.py")):
        before, text = digests.code_digest(package), path.read_text()
        path.write_text(f"{text}\n")
        assert digests.code_digest(package) != before, path
        path.write_text(text)

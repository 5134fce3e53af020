"""Copies of the shards on a node are checked, resumed, shared between runs and removed."""

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import lines, run

from fasttrain import config, files, shards, staging, train
from fasttrain.faults import ConfigError
from fasttrain.shards import ShardError
from fasttrain.staging import Report, Staging


def alone(report: Report | None) -> list[Report | None]:
    return [report]


def settings(stage: Path, **more: Any) -> config.Data:
    return config.Data(stage=stage, **more)


def staged(root: Path, data: config.Data) -> Staging:
    copy = Staging(root, data)
    staging.wait(copy, alone, lambda text: None)
    return copy


def same_files(one: Path, other: Path) -> bool:
    def contents(root: Path) -> dict[str, bytes]:
        return {
            p.name: p.read_bytes() for p in root.iterdir() if p.name.startswith(("t", "v", "m"))
        }

    return contents(one) == contents(other)


def test_a_staged_copy_is_a_data_set_and_is_removed_at_the_end(
    dataset: Path, tmp_path: Path
) -> None:
    data, said = settings(tmp_path / "node" / "local"), list[str]()
    copy = Staging(dataset, data)
    staging.wait(copy, alone, said.append)
    assert same_files(copy.folder, dataset)
    split = staging.open_copy(shards.open_split(dataset, "train"), data)
    assert split.root == copy.folder and split.shard_paths[0].parent == copy.folder
    assert "MB on 1 node, of which" in said[-1] and "copied and checked in" in said[-1]
    copy.release()
    assert not copy.folder.exists()


def test_staged_files_are_not_copied_again(dataset: Path, tmp_path: Path) -> None:
    data = settings(tmp_path, stage_keep=True)
    copy = staged(dataset, data)
    copy.release()
    assert copy.copied == copy.total
    again = staged(dataset, data)
    again.release()
    assert again.copied == 0 and again.done == again.total
    # As after a kill: one tar is missing, one is another's, one was on its way.
    (copy.folder / "train-000001.tar").unlink()
    (copy.folder / "val-000000.tar").write_bytes(b"short")
    (copy.folder / f"train-000001.tar.here-1{files.TEMPORARY}").write_bytes(b"half")
    missing = sum(
        (dataset / name).stat().st_size for name in ("train-000001.tar", "val-000000.tar")
    )
    once_more = staged(dataset, data)
    once_more.release()
    assert once_more.copied == missing and same_files(copy.folder, dataset)
    assert not list(copy.folder.glob(f"*{files.TEMPORARY}"))


def test_a_run_from_a_copy_is_the_same_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    runs = []
    for name, data in (
        ("plain", {}),
        ("whole", {"stage": str(tmp_path / "node"), "stage_keep": True}),
        ("part", {"stage": str(tmp_path / "other"), "stage_part": 0.5}),
    ):
        recipe = tiny(name, data=data, log={"run_dir": str(tmp_path / name), "samples": True})
        train.main([str(recipe)])
        runs.append(
            [
                (line["step"], line["loss"])
                for line in lines(tmp_path / name / "metrics.jsonl", "train")
            ]
            + lines(tmp_path / name / "samples-rank0.jsonl")
        )
    assert runs[0] == runs[1] == runs[2]
    assert [p.name for p in (tmp_path / "node").iterdir() if p.is_dir()]
    assert not [p.name for p in (tmp_path / "other").iterdir() if p.is_dir()]


def test_a_part_leaves_the_other_tars_where_they_are(dataset: Path, tmp_path: Path) -> None:
    data = settings(tmp_path, stage_part=0.3)  # of four tars
    copy = staged(dataset, data)
    paths = staging.open_copy(shards.open_split(dataset, "train"), data).shard_paths
    assert [path.parent for path in paths] == [copy.folder] * 2 + [dataset] * 2
    assert all(path.exists() for path in paths) and not (copy.folder / shards.MANIFEST).exists()
    (val,) = staging.open_copy(shards.open_split(dataset, "val"), data).shard_paths[:1]
    assert val.parent == copy.folder
    copy.release()


def test_two_runs_on_a_node_make_one_copy(dataset: Path, tmp_path: Path) -> None:
    copies = [Staging(dataset, settings(tmp_path)) for _ in range(2)]
    for copy in copies:
        staging.wait(copy, alone, lambda text: None)
    assert sum(copy.copied for copy in copies) == copies[0].total
    copies[0].release()
    assert copies[0].folder.exists()  # which the other one still reads
    copies[1].release()
    assert not copies[0].folder.exists()


def test_faults_that_stop_staging_are_named(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    data = bytearray((broken / "train-000002.tar").read_bytes())
    data[700] ^= 1
    (broken / "train-000002.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000002\.tar is damaged: its sha256 is not that"):
        staged(broken, settings(tmp_path / "node"))
    copy = staging.folder_of(broken, tmp_path / "node")
    assert not (copy / "train-000002.tar").exists() and not (copy / shards.MANIFEST).exists()
    (broken / "train-000002.tar").unlink()
    with pytest.raises(
        ShardError, match=r"stage = .*No such file.*train-000002\.tar.*name another"
    ):
        staged(broken, settings(tmp_path / "node"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"Not a directory.*name another folder"):
        staged(dataset, settings(tmp_path / "file" / "node"))
    monkeypatch.setattr(staging, "free_bytes", lambda folder: 60_000)
    with pytest.raises(ShardError, match=r"are to be copied, and .* GB are free; .*stage_part=0\."):
        staged(dataset, settings(tmp_path / "full"))


def test_all_nodes_wait_and_stop_together() -> None:
    whole, half = Report("a", 8, 8, 8, True, ""), Report("b", 4, 8, 4, False, "")
    rounds = iter([[whole, None, half, None], [whole, None, half._replace(done=8, finished=True)]])
    said: list[str] = []
    staging.wait(None, lambda report: next(rounds), said.append)
    assert next(rounds, None) is None and "on 2 nodes" in said[0]
    full = half._replace(finished=True, fault="no room")
    with pytest.raises(ShardError, match=r"^b: no room$"):
        staging.wait(None, lambda report: [whole, full], said.append)


def test_a_recipe_that_copies_nothing_has_nothing_to_keep(tmp_path: Path) -> None:
    for setting in ("data.stage_keep=true", "data.stage_part=0.5"):
        with pytest.raises(ConfigError, match="nothing is copied; set stage to a folder"):
            config.load(Path("recipes/demo.toml"), [setting])


def test_file_systems_and_free_space_are_read() -> None:
    assert staging.file_system_of(Path("/proc/self")) == "proc"
    assert staging.free_bytes(Path("/dev/shm")) > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_one_process_writes_and_one_per_node_looks_at_the_tars(
    dataset: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Rank 0 alone writes. One process per node looks up the tars by name."""
    calls = "openat,newfstatat,statx,access,mkdir,unlink,rename,readlink,getdents64"
    traced = f'exec strace -f -qq -y -e trace={calls} -o {tmp_path}/$RANK python "$@"'
    launch = ["accelerate", "launch", "--no_python", "--multi_gpu", "--num_processes", "2"]
    words = ["--main_process_port", "0", "bash", "-c", traced, "_", "fasttrain/train.py", tiny()]
    run([*launch, *words], ACCELERATE_USE_CPU="1")
    counts = []
    for rank in (0, 1):
        lines = (tmp_path / str(rank)).read_text(errors="replace").splitlines()
        ours = [line for line in lines if str(dataset) in line or f"{tmp_path}/run" in line]
        data = [line for line in ours if str(dataset) in line]
        by_name = [line for line in data if f'"{dataset}' in line]
        run_folder = [line for line in ours if f"{tmp_path}/run" in line]
        writes = [
            line for line in run_folder
            if re.search(r"O_WRONLY|O_RDWR|O_CREAT|\b(mkdir|unlink|rename)\(", line)
        ]  # fmt: skip
        opened = Counter(Path(found[1]).name for line in by_name if (found := OPENED.search(line)))
        looked = sum("newfstatat(AT_FDCWD" in line and ".tar" in line for line in by_name)
        counts.append((len(lines), len(data), len(by_name), len(run_folder)))
        print(f"rank {rank}: {len(lines)} calls, {len(data)} on the shards, {len(by_name)} of them")
        print(f"  by name, {len(run_folder)} on the run folder, {len(writes)} of them to write")
        assert bool(writes) == (rank == 0)
        num_tars = len(list(dataset.glob("*.tar")))
        assert looked == (num_tars if rank == 0 else 0)
        # Once when the input is measured, and once to train.
        assert all(opened[p.name] <= 2 for p in dataset.glob("train-*.tar"))
        assert opened["manifest.json"] == 2 and opened["train.index"] == opened["val.index"] == 1
    assert counts[1][2] < 40 and counts[1][3] < 10


OPENED = re.compile(r'openat\(AT_FDCWD[^,]*, "([^"]+)"')

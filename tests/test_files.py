"""Files and folders are replaced whole, and synced before and after they get their names."""

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain import files


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records what is done to files and folders, in order."""
    found: list[str] = []
    fsync = os.fsync

    def synced(file: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
        found.append(f"sync {kind}")
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)

    def renamed(real: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def call(source: Any, target: Any) -> None:
            found.append("rename")
            real(source, target)

        return call

    monkeypatch.setattr(os, "replace", renamed(os.replace))
    monkeypatch.setattr(os, "rename", renamed(os.rename))
    return found


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, steps: list[str]) -> None:
    path = tmp_path / "a"
    files.write_text(path, "caf\u00e9 \udcff")
    assert steps == ["sync file", "rename", "sync folder"]
    assert path.read_bytes() == b"caf\xc3\xa9 \xff" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_on_the_disk_before_its_name_is(tmp_path: Path, steps: list[str]) -> None:
    files.write_folder(tmp_path / "a", {"x": b"1", "y": b""})
    assert steps == ["sync file", "sync file", "sync folder", "rename", "sync folder"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {"x": b"1", "y": b""}
    files.remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), files.atomic(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_moved_files_are_synced_where_they_were_and_are(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "to").mkdir()
    for name in "ab":
        (tmp_path / name).touch()
    files.move([tmp_path / "a", tmp_path / "b"], tmp_path / "to")
    assert steps == ["rename", "rename", "sync folder", "sync folder"]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["a", "b"]


def test_only_our_own_leftovers_are_cleared(tmp_path: Path) -> None:
    for name in ("a.tmp", f"b.host-1{files.TEMPORARY}"):
        (tmp_path / name).touch()
    files.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tmp"]


def test_locks_exclude_and_are_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path):
        other = os.open(path, os.O_RDONLY)
        assert not files.lock(other, wait_s=0) and not files.lock(other, shared=True, wait_s=0)
        waiting = threading.Thread(target=files.lock, args=(other,))
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()
    third = os.open(path, os.O_RDONLY)
    assert not files.lock(third, wait_s=0)
    os.close(other)
    assert files.lock(third, shared=True, wait_s=0)
    os.close(third)


def test_a_killed_process_gives_its_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = os.fork()
    if not child:
        with files.locked(path):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    file = os.open(path, os.O_RDONLY)
    assert files.lock(file, wait_s=0)
    os.close(file)


def test_no_other_module_writes_atomically_or_locks() -> None:
    """Only the module `files` makes these calls."""
    source = Path(files.__file__).parent
    own = {"fcntl.flock", "os.fsync", "os.replace"}
    probing = {"caches.py": {"os.fsync"}}  # which looks whether a folder can be filled at all
    for path in source.rglob("*.py"):
        if path.name != "files.py":
            found = {call for call in own if call in path.read_text()}
            assert found <= probing.get(path.name, set()), path

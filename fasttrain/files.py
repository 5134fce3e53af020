"""Atomic writes, synced folders and file locks. No other module does these things by itself.

A file or a folder is written under a temporary name, synced to the disk and renamed. If the process
is killed or the machine loses power, the old contents or the new contents are there, never a part.
A file or a folder under a temporary name may be left.
"""

import contextlib
import errno
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".fasttrain.tmp"  # ends the names of unfinished files; a user's own .tmp files stay
POLL_S = 0.2  # between two attempts to take a lock

# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing; it replaces `path` when the block ends without an exception.

    Raises:
        OSError: the file system refused.
    """
    # The name has the machine and the process in it: the parts of an array of jobs share a folder.
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically.

    Raises:
        OSError: the file system refused.
    """
    with atomic(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically by text in UTF-8. Surrogates become the bytes that they stand for.

    Raises:
        OSError: the file system refused.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def sync(file: int) -> None:
    """Makes what was written to an open file survive a loss of power.

    Raises:
        OSError: the file system refused.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # devices, and folders of some network file systems
            raise


def clear(folder: Path) -> None:
    """Removes the files that an interrupted `atomic` left in a folder; no other process may write.

    Raises:
        OSError: the file system refused.
    """
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Makes new, renamed and removed names in a folder survive a loss of power.

    Raises:
        OSError: the file system refused.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Makes a folder of files by name; the folder must not exist, and appears with all its files.

    Raises:
        OSError: the file system refused; there is no such folder then.
    """
    temporary = _free_name(folder)
    try:
        temporary.mkdir()
        for name, data in contents.items():
            _write_new(temporary / name, data)
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder, which disappears with all its files at once.

    Raises:
        OSError: the file system refused; the folder is still whole then.
    """
    shutil.rmtree(folder.rename(_free_name(folder)), ignore_errors=True)


def move(paths: Iterable[Path], folder: Path) -> None:
    """Moves files and folders into `folder`, one after the other; all are on one file system.

    Raises:
        OSError: the file system refused. Some of them may be moved then.
    """
    parents = {folder}
    for path in paths:
        path.rename(folder / path.name)
        parents.add(path.parent)
    for parent in parents:
        sync_folder(parent)


def replace_text(path: Path, text: str) -> None:
    """As `write_text`, but without a sync: after a loss of power, the file may be empty.

    Raises:
        OSError: the file system refused.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    temporary.write_text(text)
    os.replace(temporary, path)


def link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`. Replaces a link that is there.

    Raises:
        OSError: the file system refused.
    """
    if path.is_symlink() and os.readlink(path) == target:
        return
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


def _write_new(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        sync(file)
    finally:
        os.close(file)


def _free_name(folder: Path) -> Path:
    """A temporary name that is not taken: an earlier leftover may not have been removable."""
    number = 0
    while (path := folder.with_name(f"{folder.name}.{number}.tmp")).exists():
        number += 1
    return path


# --------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------


def lock(file: int, *, shared: bool = False, wait_s: float = math.inf) -> bool:
    """Locks an open file or folder until its descriptor is closed.

    Args:
        file: a descriptor.
        shared: other processes may share the lock. Otherwise this process has it alone.
        wait_s: seconds to wait for other processes.
    Returns:
        False if another process still has the lock after `wait_s`.
    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if wait_s == math.inf:
        fcntl.flock(file, kind)
        return True
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock on the file `path`, which is made if it is missing, and holds it.

    Raises:
        OSError: the file cannot be made, or the file system has no locks.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(file)
        yield
    finally:
        os.close(file)

"""Kills a forked process at any call of the file system, for tests of what is written."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = tuple[Any, str]  # an owner, such as a module, and the name of its function
CHANGES = (
    *("open", "write", "pwrite", "ftruncate", "fsync"),
    *("mkdir", "rename", "replace", "rmdir", "unlink"),
)
CALLS: tuple[Call, ...] = (
    *((os, name) for name in CHANGES),
    *((os, name) for name in ("close", "scandir", "listdir", "stat")),
)
# A crash before any other call leaves the same files as a crash before the next of these calls.
DEADLY: tuple[Call, ...] = (*((os, name) for name in CHANGES), (io, "open"))


def count_calls(at: int, act: Callable[[], object], counted: tuple[Call, ...] = CALLS) -> list[str]:
    """Calls `act` before call number `at` of the `counted` functions in this process, from 0.

    If that call is a write, half of its bytes are written before `act`.

    Returns:
        The names of the calls so far; the list grows.
    """
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                act()
            return real(*args, **kwargs)

        return call

    for owner, name in counted:
        setattr(owner, name, wrap(name, getattr(owner, name)))
    return calls


def in_a_child(work: Callable[[], int]) -> int:
    """Runs `work` in a forked process. Returns its result as the exit status; 99 if it raised."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(number: int, action: Callable[[], object], more: tuple[Call, ...] = ()) -> bool:
    """Kills a child that runs `action` before its change number `number` of the file system.

    Args:
        more: functions that count as such changes as well.
    Returns:
        True if the child was killed; False if it made fewer changes.
    """

    def work() -> int:
        count_calls(number, lambda: os.kill(os.getpid(), signal.SIGKILL), (*DEADLY, *more))
        action()
        return 0

    status = in_a_child(work)
    assert status in (0, -signal.SIGKILL), f"exit status {status}"
    return status != 0


def loses_power_at(number: int, action: Callable[[], object], root: Path) -> bool:
    """As `dies_at`, but files below `root` that were written and not synced afterwards are lost.

    Such a file is empty afterwards, also if it was renamed. File systems may leave it so.
    """
    unsynced: set[int] = set()  # numbers of the files (inodes)
    real_open, real_os_open, real_fsync = io.open, os.open, os.fsync

    def opened(file: int) -> None:
        unsynced.add(os.fstat(file).st_ino)

    def open_text(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        if "r" not in mode:
            opened(file.fileno())
        return file

    def open_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        file = real_os_open(path, flags, *args, **kwargs)
        if flags & os.O_TRUNC or flags & os.O_EXCL:
            opened(file)
        return file

    def fsync(file: int) -> None:
        real_fsync(file)
        unsynced.discard(os.fstat(file).st_ino)

    def lose_power() -> None:
        for path in root.rglob("*"):
            if path.is_file() and path.stat().st_ino in unsynced:
                os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        io.open, os.open, os.fsync = open_text, open_file, fsync  # type: ignore[assignment]
        count_calls(number, lose_power, DEADLY)
        action()
        return 0

    status = in_a_child(work)
    assert status in (0, -signal.SIGKILL), f"exit status {status}"
    return status != 0

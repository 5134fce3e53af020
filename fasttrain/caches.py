"""Chooses the folders that keep measurements and compiled code for later runs. Needs no torch."""

import contextlib
import getpass
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

PROBE_BYTES = 4096  # written as a test: with a full quota, files can be made but not filled
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def cache_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/fasttrain`; `~/.cache/fasttrain` if that variable is not set.

    If it cannot be written, returns a temporary folder of this user.
    """
    wanted = _wanted()
    return _temporary() if fault_of(wanted) else wanted


def remarks() -> list[str]:
    """Returns a warning for each folder that cannot be written."""
    found = []
    if fault := fault_of(_wanted()):
        found.append(
            f"WARNING: {_wanted()} cannot be written ({fault}); measurements and compiled code are "
            f"kept in {cache_dir()} instead: set XDG_CACHE_HOME to a folder that lasts"
        )
    if (chosen := _chosen()) and (fault := fault_of(chosen)):
        found.append(
            f"WARNING: {COMPILED} = {chosen} cannot be written ({fault}); compiled code is kept in "
            f"{cache_dir()} instead: set it to another folder"
        )
    return found


def keep_compiled() -> None:
    """Makes torch.compile and Triton keep compiled code, unless the user has chosen a folder.

    Call it before the first optimizer is built, which imports the compiler. On import, the compiler
    chooses a temporary folder and writes it into the environment. `accelerate launch` also passes
    such a folder on.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the uid has no name; torch before 2.13 then fails
        os.environ["USER"] = f"uid{os.getuid()}"
    chosen = _chosen()
    if not chosen or fault_of(chosen):
        os.environ[COMPILED] = str(cache_dir() / "inductor")
    # One folder for all kernels: the compiler would choose another one in the middle of a run.
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


@cache
def fault_of(folder: Path) -> str:
    """Makes a folder and tests it. Returns why it cannot be written; "" if it can.

    The answer is kept for this process.
    """
    if not folder.is_absolute():  # `~` is not expanded without HOME and without a name of the user
        return "it is not an absolute path; HOME may not be set"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _wanted() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        # With an empty HOME, expanduser gives /.cache.
        home = "~/.cache" if os.environ.get("HOME") == "" else os.path.expanduser("~/.cache")
    return Path(home) / "fasttrain"


def _chosen() -> Path | None:
    """The folder that the user has chosen for compiled code, if any."""
    temporary = os.path.join(tempfile.gettempdir(), "torchinductor_")
    path = os.environ.get(COMPILED) or temporary
    return None if path.startswith(temporary) else Path(path).absolute()


@cache
def _temporary() -> Path:
    """Returns a temporary folder, the same in later runs.

    Code is loaded from it, so it must not be writable by other users.
    """
    folder = Path(tempfile.gettempdir()) / f"fasttrain-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            if not found.st_mode & 0o022 and not fault_of(folder):
                return folder
    return Path(tempfile.mkdtemp(prefix="fasttrain-"))

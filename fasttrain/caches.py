"""Where measurements and compiled code are kept for later runs. Needs no torch."""

import contextlib
import getpass
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

PROBE_BYTES = 4096  # that must fit, as a full quota lets files be made but not filled
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fasttrain`, else `~/.cache/fasttrain`; a temporary folder of this user where
    that cannot be written."""
    wanted = _wanted()
    return _temporary() if fault_of(wanted) else wanted


def remarks() -> list[str]:
    """What a user should know of it; nothing as a rule."""
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
    """Keeps what torch.compile and Triton make for later runs, where nobody has said where.

    The compiler, once imported, settles on a temporary folder and says so in the environment:
    `accelerate launch` hands one down, and the first optimizer that is built imports it here.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, which torch before 2.13 does not survive
        os.environ["USER"] = f"uid{os.getuid()}"
    chosen = _chosen()
    if not chosen or fault_of(chosen):
        os.environ[COMPILED] = str(cache_dir() / "inductor")
    if fault_of(_wanted()):  # Triton writes into the same home
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


@cache
def fault_of(folder: Path) -> str:
    """Why a folder cannot be written, or empty; makes it. Asked once in a process."""
    if not folder.is_absolute():  # as of `~` without HOME and without such a user
        return "it is no absolute path; HOME may not be set"
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
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fasttrain"


def _chosen() -> Path | None:
    """Where a user has said that compiled code goes."""
    temporary = os.path.join(tempfile.gettempdir(), "torchinductor_")
    path = os.environ.get(COMPILED) or temporary
    return None if path.startswith(temporary) else Path(path).absolute()


@cache
def _temporary() -> Path:
    """A folder that nobody else can write, as code is loaded from it; the same in later runs."""
    folder = Path(tempfile.gettempdir()) / f"fasttrain-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            if not found.st_mode & 0o022 and not fault_of(folder):
                return folder
    return Path(tempfile.mkdtemp(prefix="fasttrain-"))

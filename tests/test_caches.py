"""If the home folder cannot be written, caches go elsewhere, and one line says so."""

import errno
import getpass
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttrain import caches


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets what was tested before, and restores TORCHINDUCTOR_CACHE_DIR and the like."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in (caches.COMPILED, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for function in (caches.fault_of, caches._temporary):
        function.cache_clear()
    yield
    for function in (caches.fault_of, caches._temporary):
        function.cache_clear()


def test_a_home_that_can_be_written_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.cache_dir() == tmp_path / "fasttrain" and caches.remarks() == []
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    caches.keep_compiled()
    assert os.environ[caches.COMPILED] == str(tmp_path / "fasttrain" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "fasttrain" / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    caches.keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "Read-only"), (errno.EDQUOT, "quota")])
def test_a_cache_folder_that_cannot_be_written_is_replaced_with_a_warning(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full quota shows only when a file is filled."""
    home, real = tmp_path / "home", os.fsync

    def fsync(file: int) -> None:
        if str(home) in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(os, "fsync", fsync)
    expected = tmp_path / "tmp" / f"fasttrain-{os.getuid()}"
    assert caches.cache_dir() == expected and expected.stat().st_mode & 0o777 == 0o700
    (remark,) = caches.remarks()
    assert remark.startswith(f"WARNING: {home}/fasttrain cannot be written (") and said in remark
    assert f"kept in {expected} instead: set XDG_CACHE_HOME to a folder that lasts" in remark
    caches.keep_compiled()
    assert os.environ[caches.COMPILED] == str(expected / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(expected / "triton")


def test_without_a_home_a_temporary_folder_is_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens to a user without a name in a container."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "")
    assert caches.cache_dir().parent == tmp_path / "tmp"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert caches.cache_dir().parent == tmp_path / "tmp"
    assert "it is not an absolute path; HOME may not be set" in caches.remarks()[0]
    assert not Path("~").exists()


def test_a_user_without_a_name_is_called_by_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    caches.keep_compiled()
    assert getpass.getuser() == f"uid{os.getuid()}"


def test_a_folder_that_others_can_write_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    theirs = tmp_path / "tmp" / f"fasttrain-{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    assert caches.cache_dir() != theirs and caches.cache_dir().parent == tmp_path / "tmp"


def test_a_chosen_folder_that_cannot_be_written_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(caches.COMPILED, "/proc/compiled")
    (remark,) = caches.remarks()
    assert remark.startswith("WARNING: TORCHINDUCTOR_CACHE_DIR = /proc/compiled cannot be written")
    caches.keep_compiled()
    assert os.environ[caches.COMPILED] == str(tmp_path / "fasttrain" / "inductor")

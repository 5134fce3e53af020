"""make_digits.py makes the demo's data set, also after an interruption, and names its faults."""

import sys
from pathlib import Path
from types import SimpleNamespace

import make_digits
import numpy as np
import pytest
from PIL import Image

from fasttrain import shards


@pytest.fixture(autouse=True)
def ten_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for scikit-learn, whose import takes seconds: ten images of the digit 0 or 1."""
    grey = np.arange(10 * 64).reshape(10, 8, 8) % 17.0
    found = SimpleNamespace(images=grey, target=np.arange(10) % 2)
    library = SimpleNamespace(load_digits=lambda: found)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", library)


def test_photographs_and_shards_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits"
    make_digits.main([str(out)])
    photographs = sorted((tmp_path / "digits-images").rglob("*.jpg"))
    assert len(photographs) == 10
    with Image.open(photographs[0]) as image:
        assert (image.size, image.mode) == ((64, 64), "L")
    assert shards.open_split(out, "train").num_samples == 8
    assert shards.open_split(out, "val").num_samples == 2
    said = f"writing photographs of handwritten digits to {out}-images, and their shards to {out}"
    assert said in capsys.readouterr().out
    make_digits.main([str(out)])
    assert f"{out} holds a finished data set already" in capsys.readouterr().out


def test_a_killed_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "digits"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_digits.sharding, "_clear_away", killed)
        make_digits.main([str(out)])
    photographs = sorted((tmp_path / "digits-images").rglob("*.jpg"))
    times = [path.stat().st_mtime_ns for path in photographs]
    assert (out / shards.UNFINISHED).exists()
    make_digits.main([str(out)])
    assert [path.stat().st_mtime_ns for path in photographs] == times
    assert not (out / shards.UNFINISHED).exists()
    assert shards.open_split(out, "train").num_samples == 8


def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        make_digits.main([str(tmp_path / "digits")])
    assert stopped.value.code == 2
    assert "scikit-learn is not installed" in (said := capsys.readouterr().err)
    assert "pip install -e '.[demo]'" in said and not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits-images").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as stopped:
        make_digits.main([str(tmp_path / "digits")])
    assert stopped.value.code == 2
    assert "cannot write the digits: [Errno 20] Not a directory" in capsys.readouterr().err

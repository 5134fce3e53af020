"""Names give the right split, and the draw of a split is stable."""

from pathlib import Path, PurePosixPath

import pytest

from fasttrain import splits
from fasttrain.listing import Found
from fasttrain.shards import ShardError


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("train-0.tar", "train"),
        ("strain-val-0.tar", "val"),
        ("constrained_valid_000.tar", "valid"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("Train2017.tar", "train"),
        ("latest-0.tar", None),
        ("evaluate-0.tar", None),
        ("00000.tar", None),
        ("train/00000.tar", "train"),
        ("test/0.tar", "test"),
        ("my_train_set/0.tar", "train"),
        ("test-drive/train-0.tar", "train"),
        ("val/train-val-0.tar", "val"),
        ("dev/eu/0.tar", "dev"),
    ],
)
def test_splits_are_whole_words(path: str, word: str | None) -> None:
    assert splits.word_of(PurePosixPath(path)) == word


@pytest.mark.parametrize("path", ["train-val-0.tar", "train/test-0.tar", "x-test/val-test.tar"])
def test_names_that_contradict_each_other_are_refused(path: str) -> None:
    with pytest.raises(ShardError, match=r"names several splits \(.*\): rename it"):
        splits.word_of(PurePosixPath(path))


def test_two_words_for_one_split_are_refused() -> None:
    splits.one_word_each(["train", "val", "test"])
    with pytest.raises(ShardError, match="dev and val both name the val split"):
        splits.one_word_each(["train", "dev", "val"])


def test_drawing_is_by_class_and_stable() -> None:
    def images(count: int) -> list[Found]:
        return [Found(Path("p"), -1, 1, "ab"[n % 2], f"{n}.jpg") for n in range(count)]

    train, val = splits.hold_out(images(400), 0.1, 7)
    assert [sum(item.label == label for item in val) for label in "ab"] == [20, 20]
    assert {*train, *val} == {*images(400)} and len(train) == 360
    assert {*splits.hold_out(images(400)[::-1], 0.1, 7)[1]} == {*val}  # in any order
    for more in (1, 2, 20):
        moved = set(val) - set(splits.hold_out(images(400 + more), 0.1, 7)[1])
        assert len(moved) <= more
    assert [len(part) for part in splits.hold_out(images(2), 0.5, 0)] == [2, 0]
    assert [len(part) for part in splits.hold_out(images(4), 0.99, 0)] == [2, 2]

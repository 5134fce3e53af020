"""What holds for any recipe, any data set and any number of processes."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain import config, sampling, schedule, shards
from fasttrain.config import Optim, Recipe, Train

settings.register_profile(
    "fasttrain",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fasttrain")

KEYS = {name: list(table) for name, table in Recipe().model_dump().items()}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.text(), st.lists(st.tuples(st.sampled_from(sorted(KEYS)), st.integers(0, 40), VALUES)))
def test_any_recipe_loads_or_is_refused(text: str, changes: list[tuple[str, int, Any]]) -> None:
    """As TOML, or as settings on the command line: never another exception."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        given_settings = [
            f"{section}.{KEYS[section][place % len(KEYS[section])]}={json.dumps(value)}"
            for section, place, value in changes
        ]
        for overrides in ([], given_settings):
            try:
                recipe = config.load(path, overrides)
            except config.ConfigError as error:
                assert str(path) in str(error)
                path.write_text("")
            else:
                path.write_text(config.dumps(recipe))
                assert config.load(path) == recipe


@st.composite
def plans(draw: st.DrawFn) -> tuple[Train, Optim, int, list[tuple[int, int]]]:
    """A batch, a schedule, a number of images, and all (processes, micro-batch) that fit."""
    batch = draw(st.integers(1, 24))
    epochs = draw(st.integers(1, 5))
    train = Train(epochs=epochs, global_batch_size=batch, seed=draw(st.integers(0, 2**63)))
    low, high, last = sorted(draw(st.lists(st.floats(0, 2), min_size=3, max_size=3)))
    optim = Optim(
        lr=high + 0.1, warmup_lr=low, final_lr=min(last, high),
        warmup_epochs=draw(st.floats(0, epochs)),
    )  # fmt: skip
    ways = [
        (world, micro)
        for world in range(1, batch + 1)
        for micro in range(1, batch + 1)
        if batch % world == 0 and batch // world % micro == 0
    ]
    return train, optim, draw(st.integers(batch, 60)), ways


@given(plans())
def test_the_arithmetic_of_any_run(given: tuple[Train, Optim, int, list[tuple[int, int]]]) -> None:
    train, optim, num_samples, ways = given
    rates = set()
    for world, micro in ways:
        plan = schedule.make_plan(
            train.model_copy(update={"micro_batch_size": micro}), optim, num_samples, world
        )
        assert plan.micro_batch_size * world * plan.accumulation == train.global_batch_size
        assert plan.steps_per_epoch * train.global_batch_size <= num_samples
        assert sum(plan.eval_due(step) for step in range(plan.total_steps + 1)) == train.epochs
        rates.add(tuple(schedule.lr_at(step, plan) for step in range(plan.total_steps)))
    (lr,) = rates  # the same on any number of processes
    low, high = min(optim.warmup_lr, optim.final_lr), optim.lr
    assert all(low - 1e-9 <= rate <= high + 1e-9 for rate in lr)
    rising, falling = lr[: plan.warmup_steps], lr[plan.warmup_steps :]
    assert list(rising) == sorted(rising) and list(falling) == sorted(falling, reverse=True)


@pytest.fixture(scope="module")
def split(dataset: Path) -> shards.Split:
    return shards.open_split(dataset, "train")


@settings(max_examples=25)
@given(plans(), st.booleans(), st.integers(1, 4))
def test_any_split_of_the_work_sees_the_same(
    split: shards.Split,
    given: tuple[Train, Optim, int, list[tuple[int, int]]],
    blocks: bool,
    shuffle_shards: int,
) -> None:
    train, optim, _, ways = given
    data = config.Data(
        shuffle="blocks" if blocks else "full", shuffle_shards=shuffle_shards, augment="trivial",
        erase=0.5,
    )  # fmt: skip

    def seen(world: int, micro: int) -> list[np.ndarray]:
        plan = schedule.make_plan(
            train.model_copy(update={"micro_batch_size": micro}), optim, split.num_samples, world
        )
        draws = [
            sampling.train_draw(split, data, plan, step, rank, part)
            for step in range(min(plan.total_steps, 2 * plan.steps_per_epoch))
            for part in range(plan.accumulation)
            for rank in range(world)
        ]
        columns = [
            (d.ids, d.windows, d.flips, d.augment.operations, d.augment.erase) for d in draws
        ]
        return [np.concatenate(column) for column in zip(*columns, strict=True)]

    whole = seen(1, train.global_batch_size)
    for world, micro in ways:
        for ours, theirs in zip(whole, seen(world, micro), strict=True):
            assert np.array_equal(ours, theirs)
    ids, windows = whole[:2]
    per_epoch = split.num_samples // train.global_batch_size * train.global_batch_size
    for epoch in range(len(ids) // per_epoch):
        assert len(set(ids[epoch * per_epoch : (epoch + 1) * per_epoch].tolist())) == per_epoch
    x, y, w, h = windows.T
    assert (x >= 0).all() and (y >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (x + w <= split.width[ids]).all() and (y + h <= split.height[ids]).all()


@given(st.sets(st.integers(0, 44), min_size=1, max_size=40), st.integers(0, 2**40))
def test_stand_ins_are_good_and_their_own(bad: set[int], seed: int) -> None:
    ids = np.arange(45)
    found = sampling.stand_ins(seed, 3, ids, bad, 45)
    assert not bad & set(found.tolist())
    kept = [i for i in ids.tolist() if i not in bad]
    assert found[kept].tolist() == kept
    alone = [int(sampling.stand_ins(seed, 3, ids[i : i + 1], bad, 45)[0]) for i in range(45)]
    assert found.tolist() == alone  # whatever else is in the batch


# --------------------------------------------------------------------------------------------------
# The readers of manifest and index: also what fuzz_shards.py drives
# --------------------------------------------------------------------------------------------------


def open_with(root: Path, name: str, content: bytes) -> None:
    """Opens the data set at `root` with one file of it replaced: fine, or a `ShardError`.

    The manifest owns up to an index that is replaced, so that all of it is looked at.

    Raises:
        AssertionError: a sample lies outside of its tar, or has no pixels.
    """
    before = {file: (root / file).read_bytes() for file in ("manifest.json", name)}
    if name == "train.index":
        manifest = json.loads(before["manifest.json"])
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["splits"]["train"]["index"].update(entry)
        (root / "manifest.json").write_text(json.dumps(manifest))
    (root / name).write_bytes(content)
    try:
        split = shards.open_split(root, "train")
    except shards.ShardError as error:
        assert str(root) in str(error)
        return
    finally:
        for file, kept in before.items():
            (root / file).write_bytes(kept)
    for sample in range(split.num_samples):
        size = split.shard_paths[split.shard[sample]].stat().st_size
        assert 0 <= int(split.offset[sample]) + int(split.size[sample]) <= size
        assert split.width[sample] and split.height[sample] and split.size[sample]
        assert split.label[sample] < len(split.classes)
        assert split.shard_paths[split.shard[sample]].parent == root
    assert sum(split.shard_samples) == split.num_samples


@pytest.fixture(scope="module")
def own(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    return Path(shutil.copytree(dataset, tmp_path_factory.mktemp("own") / "shards"))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=9), st.integers(0))
def test_any_index_opens_or_is_refused(own: Path, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray((own / "train.index").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    open_with(own, "train.index", bytes(content[: cut % (2 * len(content))]))


@settings(max_examples=200)
@given(st.data())
def test_any_manifest_opens_or_is_refused(own: Path, data: st.DataObject) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = manifest
        while isinstance(node, dict | list) and len(node):
            key = data.draw(st.sampled_from([*node]) if isinstance(node, dict) else places(node))
            if data.draw(st.integers(0, 2)) == 0 or not isinstance(node[key], dict | list):
                change(data, node, key)
                break
            node = node[key]
    open_with(own, "manifest.json", json.dumps(manifest).encode())


def places(node: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(node) - 1)


def change(data: st.DataObject, node: Any, key: Any) -> None:
    how: Callable[[], Any] = data.draw(
        st.sampled_from([lambda: node.pop(key), lambda: node.__setitem__(key, data.draw(VALUES))])
    )
    how()

"""Random recipes, data sets and world sizes keep the promises of the design."""

import dataclasses
import datetime
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from conftest import shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain import config, sampling, schedule, shards
from fasttrain.config import Optim, Recipe, Train
from fasttrain.faults import ConfigError
from fasttrain.sharding import Policy

settings.register_profile(
    "fasttrain",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fasttrain")

# --------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------

KEYS = {name: list(table) for name, table in Recipe().model_dump().items()}
SCALARS = (
    st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.times()
)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
TABLES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value).lower()


def load(tables: Any, *overrides: str) -> Recipe:
    """Loads a recipe of these tables: what is refused is a `ConfigError` that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        if isinstance(tables, dict):
            tables = "\n".join(f"{toml(name)} = {toml(table)}" for name, table in tables.items())
        path.write_bytes(tables if isinstance(tables, bytes) else tables.encode())
        try:
            return config.load(path, overrides)
        except ConfigError as error:
            assert str(error).startswith(f"{path}: ")
            raise


def any_table(keys: list[str]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), TABLES, max_size=4) | TABLES


@given(
    st.fixed_dictionaries({}, optional={name: any_table(keys) for name, keys in KEYS.items()})
    | st.dictionaries(st.text(max_size=5), TABLES, max_size=3)
    | st.text()
    | st.binary()
)
def test_any_file_is_a_valid_recipe_or_is_refused(content: Any) -> None:
    try:
        load(content)
    except ConfigError:
        pass


@given(st.lists(st.text() | st.tuples(st.sampled_from(sorted(KEYS)), st.integers(0, 40), TABLES)))
def test_any_settings_are_taken_or_refused(changes: list[Any]) -> None:
    words = [
        change
        if isinstance(change, str)
        else f"{change[0]}.{KEYS[change[0]][change[1] % len(KEYS[change[0]])]}={toml(change[2])}"
        for change in changes
    ]
    try:
        load({}, *words)
    except ConfigError:
        pass


def likely(annotation: Any, default: Any) -> st.SearchStrategy[Any]:
    """Values that a setting may well take."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if isinstance(default, tuple):
        number = st.floats(0, 2)
        return st.lists(number, min_size=len(default), max_size=len(default)).map(sorted)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, float):
        return st.floats(0, 1) | st.floats()
    if isinstance(default, Path | str) or "Path" in str(annotation):
        letters = st.sampled_from("ab /.~$'\"\\#=é日") | st.characters(exclude_categories=["Cs"])
        return st.text(letters, min_size=1, max_size=9)
    return st.integers(0, 300) | st.integers()


@st.composite
def valid_tables(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Some settings of every section, none of which is wrong."""
    tables: dict[str, dict[str, Any]] = {}
    for name, section in Recipe.model_fields.items():
        tables[name] = {}
        for key in draw(st.lists(st.sampled_from(KEYS[name]), max_size=6, unique=True)):
            field = type(section.default).model_fields[key]
            tables[name][key] = draw(likely(field.annotation, field.default))
            try:
                load(tables)
            except ConfigError:
                del tables[name][key]
    return tables


@given(valid_tables())
def test_recipes_survive_writing_and_may_come_as_settings(tables: dict[str, Any]) -> None:
    recipe = load({**tables, "log": {"run_dir": "run", **tables["log"]}})
    assert load(config.dumps(recipe)) == recipe
    words = [f"{s}.{key}={toml(value)}" for s, t in tables.items() for key, value in t.items()]
    assert load({"log": {"run_dir": "run"}}, *words) == recipe
    assert config.differences(recipe, recipe) == []


# --------------------------------------------------------------------------------------------------
# Schedule and sampler
# --------------------------------------------------------------------------------------------------


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
def test_the_arithmetic_of_any_run_adds_up(
    given: tuple[Train, Optim, int, list[tuple[int, int]]],
) -> None:
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
    steepest = max(  # neither warm-up, cosine nor the step from one to the other is a jump
        (optim.lr - optim.warmup_lr) / max(1, plan.warmup_steps),
        (optim.lr - optim.final_lr) * np.pi / 2 / max(1, len(lr) - plan.warmup_steps),
    )
    assert np.abs(np.diff(lr)).max(initial=0) <= steepest + 1e-9
    rising, falling = lr[: plan.warmup_steps], lr[plan.warmup_steps :]
    assert list(rising) == sorted(rising) and list(falling) == sorted(falling, reverse=True)


@settings(max_examples=12)
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
            sampling.train_draw(split, data, plan, rank, step * plan.accumulation + part)
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


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 9),
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    st.integers(0, 10),
)
def test_any_epoch_is_a_permutation(
    split: shards.Split, seed: int, epoch: int, sizes: list[int], block: int
) -> None:
    """It is one of all samples. With blocks, the samples of each block follow one another."""
    shard_of = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint16)
    made = dataclasses.replace(
        split,
        shard=shard_of,
        offset=np.arange(sum(sizes), dtype=np.uint64),
        shard_paths=split.shard_paths[:1] * len(sizes),
    )
    order = sampling.epoch_order(seed, epoch, made, block)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(order, sampling.epoch_order.__wrapped__(seed, epoch, made, block))
    if block:
        found = list(dict.fromkeys(shard_of[order].tolist()))
        blocks = sampling._blocks(seed, epoch, made, block)
        full = [[s for s in some if sizes[s]] for some in blocks]
        assert [sorted(some) for some in full if some] == [
            sorted(found[start : start + len(some)])
            for some, start in zip(full, np.cumsum([0, *map(len, full)]).tolist(), strict=False)
            if some
        ]


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), min_size=1, max_size=9),
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=2).map(sorted),
    st.lists(st.floats(0.01, 100), min_size=2, max_size=2).map(sorted),
    st.randoms(),
)
def test_windows_lie_inside_and_do_not_depend_on_the_batch(
    seed: int, sizes: list[Any], area: Any, ratio: Any, random: Any
) -> None:
    ids, (width, height) = np.arange(len(sizes)), np.array(sizes, np.uint16).T

    def windows(of: list[int]) -> np.ndarray:
        return sampling.crop_windows(seed, 3, ids[of], (width[of], height[of]), area, ratio)

    found = windows(ids.tolist())
    x, y, w, h = found.T
    assert (found >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (x + w <= width).all() and (y + h <= height).all()
    some = random.sample(range(len(sizes)), random.randint(1, len(sizes)))
    assert np.array_equal(windows(some), found[some])


@given(st.integers(1, 9), st.integers(1, 20), st.integers(32, 300))
def test_any_evaluation_sees_each_image_once(
    split: shards.Split, world: int, batch: int, resize: int
) -> None:
    data = config.Data(eval_resize_px=resize, eval_crop_px=max(32, resize // 2))
    draws = [
        sampling.eval_draw(split, data, batch, rank, world, number)
        for rank in range(world)
        for number in range(sampling.num_eval_batches(split.num_samples, batch, rank, world))
    ]
    ids = np.concatenate([draw.ids for draw in draws])
    assert sorted(ids.tolist()) == list(range(split.num_samples))
    x, y, w, h = np.concatenate([draw.windows for draw in draws]).T
    assert (x >= 0).all() and (y >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (x + w <= split.width[ids] + 1e-3).all() and (y + h <= split.height[ids] + 1e-3).all()


@given(st.sets(st.integers(0, 44), min_size=1, max_size=40), st.integers(0, 2**40))
def test_each_damaged_sample_has_a_good_stand_in_of_its_own(bad: set[int], seed: int) -> None:
    ids = np.arange(45)
    found = sampling.replace_bad(seed, 3, ids, bad, 45)
    assert not bad & set(found.tolist())
    kept = [i for i in ids.tolist() if i not in bad]
    assert found[kept].tolist() == kept
    alone = [int(sampling.replace_bad(seed, 3, ids[i : i + 1], bad, 45)[0]) for i in range(45)]
    assert found.tolist() == alone  # whatever else is in the batch


# --------------------------------------------------------------------------------------------------
# The readers of manifest and index: also what fuzz_shards.py drives
# --------------------------------------------------------------------------------------------------


def open_with(root: Path, name: str, content: bytes) -> None:
    """Opens the data set at `root` with one file of it replaced: fine, or a `ShardError`.

    If the index is replaced, the manifest gets its digest, so that the reader checks it further.

    Raises:
        AssertionError: a sample is outside of its tar, or has no pixels.
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
        pixels = int(split.width[sample]) * int(split.height[sample])
        assert pixels and split.size[sample] >= (3 * pixels if split.store == "raw" else 1)
        assert split.label[sample] < len(split.classes)
        assert split.shard_paths[split.shard[sample]].parent == root
        assert split.name in split.describe(sample)
    assert sum(split.shard_samples) == split.num_samples
    assert (np.diff(split.shard.astype(int)) >= 0).all()


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def own(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data set to be damaged."""
    root = tmp_path_factory.mktemp("own")
    shard(folder, root, Policy(store=request.param), shard_size=11)
    return root


class Choices:
    """The source of changes to a file: numbers below a limit, and new values."""

    def __init__(self, below: Callable[[int], int], value: Callable[[], Any]) -> None:
        self.below, self.value = below, value


def changed_index(content: bytes, choices: Choices) -> bytes:
    """An index with up to three values of its columns changed, or bytes cut off or added."""
    data = bytearray(content)
    start = len(shards._INDEX_MAGIC) + 8
    count = (len(data) - start) // 24
    for _ in range(1 + choices.below(3)):
        column, sample = choices.below(len(shards._COLUMNS)), choices.below(count)
        types = [np.dtype(dtype) for _, dtype in shards._COLUMNS]
        at = start + count * sum(dtype.itemsize for dtype in types[:column])
        top = 2 ** (8 * types[column].itemsize)
        values = np.frombuffer(data, types[column], count, at)
        near = (int(values[sample]) + choices.below(5) - 2) % top
        values[sample] = [near, 0, top - 1 - choices.below(600), choices.below(top)][
            choices.below(4)
        ]
        del values  # or the bytes could not change their number
    if choices.below(8) == 0:
        del data[choices.below(len(data)) :]
    return bytes(data) + bytes(choices.below(30) if choices.below(8) == 0 else 0)


def changed_manifest(content: bytes, choices: Choices) -> bytes:
    """A manifest in which up to three things are removed, doubled or replaced."""
    manifest = json.loads(content)
    for _ in range(1 + choices.below(3)):
        node: Any = manifest
        while isinstance(node, dict | list) and node:
            places = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = places[choices.below(len(places))]
            inner = node[key]
            if isinstance(inner, dict | list) and choices.below(4):
                node = inner
                continue
            how = choices.below(5)
            if how == 0:
                del node[key]
            elif how == 1 and isinstance(node, list):
                node.append(inner)
            elif how == 2 and isinstance(inner, int):
                node[key] = inner + choices.below(5) - 2
            else:
                node[key] = choices.value()
            break
    return json.dumps(manifest).encode()


CHANGES = {"train.index": changed_index, "manifest.json": changed_manifest}


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=200)
@given(st.data())
def test_any_file_of_a_data_set_opens_or_is_refused(
    own: Path, name: str, data: st.DataObject
) -> None:
    choices = Choices(
        lambda limit: data.draw(st.integers(0, limit - 1)), lambda: data.draw(st.none() | JSON)
    )
    open_with(own, name, CHANGES[name]((own / name).read_bytes(), choices))


@pytest.mark.parametrize("name", CHANGES)
@given(st.binary(), st.integers(0, 2**16), st.binary(max_size=4))
def test_any_bytes_open_or_are_refused(
    own: Path, name: str, all: bytes, at: int, few: bytes
) -> None:
    open_with(own, name, all)
    content = (own / name).read_bytes()
    at %= len(content)
    open_with(own, name, content[:at] + few + content[at + len(few) :])

"""The plan of a run has the right steps, epochs, learning rates and image sizes."""

import math
from itertools import pairwise
from typing import Literal

import pytest
from conftest import REPO

from fasttrain import config
from fasttrain.config import Data, Optim, Train
from fasttrain.faults import ConfigError
from fasttrain.schedule import first_updates, image_px, largest_px, lr_at, make_plan


def test_every_step_of_a_small_plan_has_its_rate_and_epoch() -> None:
    train = Train(epochs=4, global_batch_size=10)
    plan = make_plan(train, Optim(lr=0.4, warmup_lr=0.1, warmup_epochs=1), 39, world_size=1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (3, 12, 3)
    cosine = [0.4 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert [lr_at(s, plan) for s in range(12)] == pytest.approx([0.1, 0.2, 0.3, *cosine])
    assert [plan.epoch_of(s) for s in range(12)] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [s for s in range(13) if plan.eval_due(s)] == [3, 6, 9, 12]
    assert [plan.evals_left(s) for s in range(13)] == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0]
    for step in (-1, 12):
        with pytest.raises(ValueError, match="outside the schedule of 12 updates"):
            lr_at(step, plan)


def test_the_published_recipe_has_the_published_length_on_imagenet() -> None:
    recipe = config.load(REPO / "recipes/large.toml")
    plans = [make_plan(recipe.train, recipe.optim, 1_281_167, world) for world in (1, 8, 64)]
    for plan in plans:
        assert (plan.steps_per_epoch, plan.total_steps) == (1251, 187_650)
        assert plan.micro_batch_size * plan.world_size * plan.accumulation == 1024
        curve = [lr_at(step, plan) for step in range(0, plan.total_steps, 97)]
        assert curve == [lr_at(step, plans[0]) for step in range(0, plan.total_steps, 97)]
    assert lr_at(0, plans[0]) == 0.1
    assert lr_at(5 * 1251, plans[0]) == 0.4
    assert lr_at(187_649, plans[0]) < 1e-9


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [("none", 4096, 1), ("linear", 4096, 4), ("linear", 256, 0.25), ("sqrt", 4096, 2)],
)
def test_the_batch_scales_the_whole_curve_of_the_learning_rate(
    scaling: Literal["none", "linear", "sqrt"], batch: int, factor: float
) -> None:
    optim = Optim(lr=0.4, warmup_lr=0.1, final_lr=0.01, warmup_epochs=1)
    train = Train(epochs=4, global_batch_size=batch)
    plain = make_plan(train, optim, 10_000, 1)
    scaled = make_plan(train, optim.model_copy(update={"lr_scaling": scaling}), 10_000, 1)
    assert scaled.peak_lr == pytest.approx(0.4 * factor)
    curves = [[lr_at(step, plan) for step in range(plan.total_steps)] for plan in (scaled, plain)]
    assert curves[0] == pytest.approx([factor * lr for lr in curves[1]])


def test_the_learning_rate_may_be_meant_for_any_batch() -> None:
    optim = Optim(lr=0.1, lr_scaling="linear", lr_batch=256)  # as is usual for SGD
    assert make_plan(Train(global_batch_size=1024), optim, 10_000, 1).peak_lr == 0.4


@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 32, 2), (2, 16, 2), (4, 16, 1), (8, None, 1)]
)
def test_accumulation_holds_the_global_batch(
    world: int, micro: int | None, accumulation: int
) -> None:
    train = Train(epochs=5, global_batch_size=64, micro_batch_size=micro)
    plan = make_plan(train, Optim(), 1000, world)
    assert plan.accumulation == accumulation
    assert plan.micro_batch_size == (micro or 8)


def test_max_steps_ends_the_run_and_leaves_the_schedule() -> None:
    train = Train(epochs=10, global_batch_size=10)
    short = make_plan(train.model_copy(update={"max_steps": 7}), Optim(), 100, 1)
    whole = make_plan(train, Optim(), 100, 1)
    assert (short.total_steps, whole.total_steps) == (7, 100)
    assert [lr_at(s, short) for s in range(7)] == [lr_at(s, whole) for s in range(7)]
    assert [s for s in range(8) if short.eval_due(s)] == [7]
    assert [short.evals_left(s) for s in range(8)] == [1] * 7 + [0]


def test_evaluations_come_every_few_epochs_and_at_the_end() -> None:
    train = Train(epochs=5, global_batch_size=10, eval_every_epochs=2)
    plan = make_plan(train, Optim(), 20, 1)
    assert [s for s in range(11) if plan.eval_due(s)] == [4, 8, 10]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "message"),
    [
        (2000, None, 1, "global_batch_size = 2000: more than the 1,000 training images"),
        (64, None, 3, "does not divide over 3 processes; use 63 or 66, or launch 2 or 4"),
        (64, 24, 2, "micro_batch_size = 24: does not divide the 32 images of each of 2 processes"),
        (64, 24, 2, "use 16 or 32"),
    ],
)
def test_a_batch_size_that_does_not_divide_names_one_that_does(
    batch: int, micro: int | None, world: int, message: str
) -> None:
    train = Train(epochs=5, global_batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ConfigError) as error:
        make_plan(train, Optim(), 1000, world)
    assert message in str(error.value)


SCALES = (128, 176, 224, 272, 320)


def test_scales_are_drawn_alike_for_all_world_sizes_and_equally_often() -> None:
    data = Data(scales_px=SCALES)
    train = Train(epochs=30, global_batch_size=64)
    plans = [make_plan(train, Optim(), 20_000, world) for world in (1, 2, 64)]
    one, *others = (
        [image_px(step, plan, data) for step in range(plan.total_steps)] for plan in plans
    )
    assert all(sizes == one for sizes in others)
    assert one[:12] == [320, 224, 224, 128, 128, 128, 128, 128, 224, 320, 128, 320]
    counts = [one.count(px) for px in SCALES]
    expected = len(one) / len(SCALES)
    # Chi-squared with 4 degrees of freedom is above 18.5 in one of 1,000 cases.
    assert sum((count - expected) ** 2 for count in counts) / expected < 18.5
    pairs = {*pairwise(one)}  # a size says nothing about the next one
    assert len(pairs) == 25
    other_seed = make_plan(train.model_copy(update={"seed": 1}), Optim(), 20_000, 1)
    assert [image_px(step, other_seed, data) for step in range(100)] != one[:100]


@pytest.mark.parametrize(
    "data",
    [
        Data(scales_px=(32, 64, 48)),
        Data(crop_px=40),
        Data(crop_px=((0, 32), (2, 48), (3, 32), (7, 64))),
    ],
    ids=["scales", "constant", "schedule"],
)
@pytest.mark.parametrize("step", [0, 3, 11, 14])
def test_the_first_update_of_each_size_is_found(data: Data, step: int) -> None:
    plan = make_plan(Train(epochs=5, global_batch_size=10), Optim(), 39, 1)
    sizes = [image_px(number, plan, data) for number in range(plan.total_steps)]
    found = first_updates(step, plan, data)
    assert found == {px: step + sizes[step:].index(px) for px in sizes[step:]}
    assert [*found.values()] == sorted(found.values())
    assert set(sizes) <= set(data.scales_px or (32, 40, 48, 64))
    assert largest_px(data) == max(data.scales_px, default=64 if data.crop_px != 40 else 40)


def test_sizes_that_no_update_draws_are_not_prepared() -> None:
    plan = make_plan(Train(epochs=5, global_batch_size=10, max_steps=2), Optim(), 39, 1)
    assert len(first_updates(0, plan, Data(scales_px=SCALES))) <= 2
    assert first_updates(2, plan, Data(scales_px=SCALES)) == {}

"""Computes the numbers of a run: steps, epochs, micro-batches, and the learning rate of a step.

A step is one optimizer update, counted from 0 over the whole run. It takes one global batch:

    global_batch_size = micro_batch_size * world_size * accumulation
"""

import math
from dataclasses import dataclass

import numpy as np

from fasttrain import config, rng
from fasttrain.faults import ConfigError
from fasttrain.rng import Stream


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of a run, for a given number of samples and a world size."""

    seed: int
    draw_seed: int  # of windows, flips and augmentations
    views: int  # after this many epochs, their draws repeat; 0: never
    num_samples: int  # of the training split
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    accumulation: int  # micro-batches per process and step
    steps_per_epoch: int  # the incomplete last batch is dropped
    schedule_steps: int  # length of the learning rate's schedule
    total_steps: int  # where the run ends; `train.max_steps` can make it less than `schedule_steps`
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    final_lr: float
    eval_every_epochs: int

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 0, of update `step`."""
        return step // self.steps_per_epoch

    def view_of(self, epoch: int) -> int:
        """Returns the view of the images in an epoch: their windows, flips and augmentations."""
        return epoch % self.views if self.views else epoch

    @property
    def num_views(self) -> int:
        """The number of views that the run's schedule needs."""
        epochs = self.epoch_of(self.schedule_steps - 1) + 1
        return min(self.views, epochs) if self.views else epochs

    def eval_due(self, num_done: int) -> bool:
        """True if an evaluation is due after `num_done` updates."""
        epoch, rest = divmod(num_done, self.steps_per_epoch)
        at_epoch = num_done > 0 and rest == 0 and epoch % self.eval_every_epochs == 0
        return at_epoch or num_done == self.total_steps

    def evals_left(self, num_done: int) -> int:
        """Returns the number of evaluations that are due after more than `num_done` updates."""
        period = self.steps_per_epoch * self.eval_every_epochs
        at_end = self.total_steps % period > 0 and num_done < self.total_steps
        return self.total_steps // period - num_done // period + at_end


def make_plan(
    train: config.Train,
    optim: config.Optim,
    num_samples: int,
    world_size: int,
    distill: config.Distill | None = None,
) -> Plan:
    """Makes the plan for `num_samples` training images and a world size.

    Args:
        distill: says which views of the images there are; None: a new one in each epoch.
    Raises:
        ConfigError: the global batch is larger than the data, or does not divide evenly.
    """
    distill = distill or config.Distill()
    batch = train.global_batch_size
    if batch > num_samples:
        raise ConfigError(
            f"[train] global_batch_size = {batch}: more than the {num_samples:,} training images; "
            "lower it"
        )
    if batch % world_size:
        below = batch // world_size * world_size
        near = [str(size) for size in (below, below + world_size) if size]
        raise ConfigError(
            f"[train] global_batch_size = {batch}: does not divide over {world_size} processes; "
            f"use {' or '.join(near)}, or launch {_near_divisors(batch, world_size)} processes"
        )
    per_process = batch // world_size
    micro = train.micro_batch_size or per_process
    if per_process % micro:
        raise ConfigError(
            f"[train] micro_batch_size = {micro}: does not divide the {per_process} images of each "
            f"of {world_size} processes (global_batch_size = {batch}); "
            f"use {_near_divisors(per_process, micro)}"
        )
    steps_per_epoch = num_samples // batch
    lr_factor = lr_factor_of(optim, batch)
    schedule_steps = train.epochs * steps_per_epoch
    return Plan(
        seed=train.seed,
        draw_seed=train.seed if distill.draw_seed is None else distill.draw_seed,
        views=distill.views,
        num_samples=num_samples,
        world_size=world_size,
        global_batch_size=batch,
        micro_batch_size=micro,
        accumulation=per_process // micro,
        steps_per_epoch=steps_per_epoch,
        schedule_steps=schedule_steps,
        total_steps=min(schedule_steps, train.max_steps or schedule_steps),
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        warmup_lr=lr_factor * optim.warmup_lr,
        peak_lr=lr_factor * optim.lr,
        final_lr=lr_factor * optim.final_lr,
        eval_every_epochs=train.eval_every_epochs,
    )


def lr_factor_of(optim: config.Optim, global_batch_size: int) -> float:
    """Returns the factor of `optim.lr_scaling` on all learning rates of the recipe; 1 if it is off.

    Source: linear: Goyal et al., arXiv:1706.02677. Square root: Krizhevsky, arXiv:1404.5997.
    """
    ratio = global_batch_size / optim.lr_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]


def _near_divisors(number: int, wanted: int) -> str:
    """Names the divisors of `number` next to `wanted`: `2 or 4`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)


def crop_px_at(epoch: int, crop_px: int | tuple[tuple[int, int], ...]) -> int:
    """Returns the side of the training crops in pixels.

    Args:
        epoch: from 0.
        crop_px: `data.crop_px` of the recipe.
    """
    if isinstance(crop_px, int):
        return crop_px
    return next(px for start, px in reversed(crop_px) if start <= epoch)


def image_px(step: int, plan: Plan, data: config.Data) -> int:
    """Returns the side of the images of an update in pixels: a function of (seed, step).

    With `data.scales_px`, the update draws one of these sizes. It is the same for all its
    micro-batches and on all ranks.

    Args:
        step: index of the update, from 0.
    """
    if not data.scales_px:
        return crop_px_at(plan.epoch_of(step), data.crop_px)
    drawn = rng.hash64(plan.seed, Stream.SCALE, step)[0]
    return data.scales_px[int(drawn % np.uint64(len(data.scales_px)))]


def first_updates(step: int, plan: Plan, data: config.Data) -> dict[int, int]:
    """The sides of the images in the updates from `step` to the end, in pixels.

    Returns:
        For each side the first of these updates that has it, in the order of these updates.
    """
    if not data.scales_px:
        first = plan.epoch_of(step)
        found: dict[int, int] = {}
        for epoch in range(first, plan.epoch_of(plan.total_steps - 1) + 1):
            begin = max(step, epoch * plan.steps_per_epoch)
            found.setdefault(crop_px_at(epoch, data.crop_px), begin)
        return found
    steps = np.arange(step, plan.total_steps)
    drawn = rng.hash64(plan.seed, Stream.SCALE, steps) % np.uint64(len(data.scales_px))
    places, offsets = np.unique(drawn, return_index=True)
    pairs = sorted(zip(offsets.tolist(), places.tolist(), strict=True))
    return {data.scales_px[place]: step + offset for offset, place in pairs}


def largest_px(data: config.Data) -> int:
    """Returns the largest side of the training crops of a recipe, in pixels."""
    if data.scales_px:
        return max(data.scales_px)
    if isinstance(data.crop_px, int):
        return data.crop_px
    return max(px for _, px in data.crop_px)


def lr_at(step: int, plan: Plan) -> float:
    """Returns the learning rate of an update: linear warm-up, then cosine to `final_lr`.

    Update 0 has `warmup_lr`, and update `warmup_steps` has `peak_lr`. The curve reaches `final_lr`
    one update after the last one.

    Args:
        step: index of the update, from 0.
    Raises:
        ValueError: `step` is outside [0, plan.schedule_steps).
    Source: SGDR, arXiv:1608.03983, eq. 5, without restarts.
    """
    if not 0 <= step < plan.schedule_steps:
        raise ValueError(f"step {step} is outside the schedule of {plan.schedule_steps} updates")
    if step < plan.warmup_steps:
        return plan.warmup_lr + (plan.peak_lr - plan.warmup_lr) * step / plan.warmup_steps
    done = (step - plan.warmup_steps) / (plan.schedule_steps - plan.warmup_steps)
    return plan.final_lr + (plan.peak_lr - plan.final_lr) * (1 + math.cos(math.pi * done)) / 2

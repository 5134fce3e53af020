"""The loop: forward, backward, accumulate, update; log, evaluate, save, stop.

Works on built objects and any iterable of batches, so that a test can train on a list. The host
waits for the device only at log lines, evaluations and checkpoints.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fasttrain import checkpoint, config, determinism, files, sampling, schedule
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.evaluator import Evaluator
from fasttrain.execution import Updater
from fasttrain.faults import Fault
from fasttrain.forecast import Forecast
from fasttrain.metrics import Clock, EvalSums
from fasttrain.mixing import Mix
from fasttrain.rng import Stream
from fasttrain.run_folder import JsonLines
from fasttrain.sampling import Draw
from fasttrain.schedule import Plan


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run trains and evaluates on."""

    train_batches: Callable[[int], Iterator[Batch]]  # this rank's micro-batches from an update on
    eval_batches: Iterable[Batch]  # this rank's share
    num_eval_samples: int  # that all ranks together must see in an evaluation
    mix: Mix | None = None  # mixes a micro-batch's images and labels, by torch's generator


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run reports to. Rank 0 alone has `metrics`."""

    checkpoints: Path
    about: dict[str, Any]  # stored in every checkpoint
    display: TrainDisplay
    metrics: JsonLines | None = None
    samples: JsonLines | None = None
    forecast: Forecast | None = None
    keys_of: Callable[[int], list[str]] | None = None  # the samples of an update, described

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record to the metrics."""
        if self.metrics:
            self.metrics.write(record)


class NonFiniteLoss(Fault, RuntimeError):
    """Loss or gradient were not finite in more updates than may be skipped."""

    raised_on_every_rank = True


class Unsaved(Fault, RuntimeError):
    """The run cannot be saved, so it does not go on."""

    raised_on_every_rank = True


class Trainer:
    """Trains from the learner's step to the end of the plan, and evaluates and saves on the way.

    The updater counts the steps in `learner.state`. The guard sums up the loss on the device; this
    object moves the sum to the log lines and the checkpoints, and counts the skipped updates.
    """

    def __init__(
        self,
        updater: Updater,
        plan: Plan,
        inputs: Inputs,
        outputs: Outputs,
        recipe: config.Recipe,
        stop_requested: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            updater: carries out the learner's updates.
            recipe: says when to log and to save.
            stop_requested: is called once a step and once a batch of an evaluation, equally often
                by all ranks. Returns 0, or the same exit status on all ranks to stop.
        """
        self.updater, self.plan = updater, plan
        self.inputs, self.outputs, self.recipe = inputs, outputs, recipe
        self.stop_requested = stop_requested
        self.accelerator, self.learner = updater.accelerator, updater.learner
        self.state = self.learner.state
        self.clock = Clock(self.accelerator.device)
        self.lr = 0.0  # of the last update
        self.looked_at = self.state.step  # updates when skipped ones were last looked for
        self.saved_step, self.failed_saves = self.state.step, 0

    def fit(self) -> dict[str, Any] | None:
        """Trains to the end of the plan, or until a stop is requested.

        Returns:
            The closing record if the run is complete, None if it was stopped. It is saved in both
            cases.
        Raises:
            NonFiniteLoss: at the first log line, evaluation or save after one update too many was
                skipped. Nothing has changed since that update.
            Unsaved: saving failed too often, or at the end.
        """
        begun = time.perf_counter()
        if self.accelerator.is_main_process:
            self.updater.guard.loss_sum += self.state.loss_sum
        # The run may have been stopped between an update and its evaluation.
        stopped = self.stop_requested() or not self._evaluate_if_due()
        batches = self.inputs.train_batches(self.state.step)
        while not stopped and not self._at_end:
            self._update(batches)
            if self._every(self.recipe.log.every_steps):
                self._log_train()
            if self.outputs.forecast and self._every(self.plan.steps_per_epoch):
                self._log_limit(self.outputs.forecast)
            stopped = self.stop_requested() or not self._evaluate_if_due()
            if stopped or self._every(self.recipe.checkpoint.every_steps):
                self._save(is_last=bool(stopped) or self._at_end)
        return self._close(time.perf_counter() - begun) if not stopped and self._at_end else None

    @property
    def _at_end(self) -> bool:
        return self.state.step >= self.plan.total_steps

    def _every(self, steps: int) -> bool:
        """True after every so many updates, and after the last one."""
        return self.state.step % steps == 0 or self._at_end

    # ---- an update

    def _update(self, batches: Iterator[Batch]) -> None:
        """One update on one global batch."""
        plan, step, rank = self.plan, self.state.step, self.accelerator.process_index
        self.lr = schedule.lr_at(step, plan)
        draws = []
        for micro in range(plan.accumulation):
            with self.clock.waiting():
                batch = next(batches)
            draws.append(batch.draw)
            images, labels = batch.images, batch.labels
            group = micro * plan.world_size + rank  # the part of the global batch
            if self.inputs.mix:
                determinism.seed_torch(plan.seed, Stream.MIX, step, group)
                images, labels = self.inputs.mix(images, labels)
            determinism.seed_torch(plan.seed, Stream.TORCH, step, group)  # dropout
            self.updater.micro(images, labels, is_last=micro + 1 == plan.accumulation)
        if self.outputs.samples:
            self.outputs.samples.write(_sample_record(draws, step))
        self.updater.update(self.lr)
        self.state.loss_images += plan.global_batch_size
        self.clock.step(plan.global_batch_size)
        self.outputs.display.step(self.state.step)

    def _look_at_skipped(self) -> None:
        """Reports updates that were skipped since the last call. Waits for the device.

        Raises:
            NonFiniteLoss: more updates were skipped than the recipe allows.
        """
        state, begin, self.looked_at = self.state, self.looked_at, self.state.step
        skipped = self.updater.guard.read()  # the same on all ranks, except for the loss
        if not skipped:
            return
        state.skipped_steps += skipped.number
        state.loss_images -= skipped.number * self.plan.global_batch_size
        step = begin + skipped.offset
        record: dict[str, Any] = {
            "event": "skipped",
            "step": step,
            "epoch": self.plan.epoch_of(step),
            "number": skipped.number,
            "lr": schedule.lr_at(step, self.plan),
            "loss": [str(loss) for loss in gather_object([skipped.loss])],  # JSON has no nan
            "gradient_norm": str(skipped.gradient_norm),
            "weight_norm": float(nn.utils.get_total_norm(list(self.learner.module.parameters()))),
        }
        self.outputs.write(record)
        what = (
            f"update {step} has loss {', '.join(record['loss'])} and gradient norm "
            f"{record['gradient_norm']} (lr {record['lr']:.4g}); its samples are listed in "
            f"{self._list_samples(record)}"
        )
        if state.skipped_steps > self.updater.guard.max_skipped:
            raise NonFiniteLoss(
                f"{what}\nneither it nor what came after it changed anything; the newest "
                "checkpoint is from before. Lower [optim] lr, lengthen warmup_epochs, or under "
                "fp16 try bf16; or leave such updates out: --set train.max_skipped_steps=10"
            )
        self.outputs.display.say(f"SKIPPED {skipped.number}, {state.skipped_steps} in all: {what}")

    def _list_samples(self, record: dict[str, Any]) -> Path:
        """Writes a record of a skipped update with its samples; returns the file."""
        step, keys_of = record["step"], self.outputs.keys_of
        path = self.outputs.checkpoints.parent / f"skipped_step_{step:08d}.json"
        if self.accelerator.is_main_process:
            samples = keys_of(step) if keys_of else []
            with contextlib.suppress(OSError):  # the metrics have most of it
                text = json.dumps(record | {"samples": samples}, indent=1)
                files.write_text(path, f"{text}\n")
        return path

    # ---- evaluation

    def _evaluate_if_due(self) -> bool:
        """Evaluates if the plan asks for it. Returns False if a stop request cut it short."""
        state = self.state
        if not self.plan.eval_due(state.step) or state.last_eval.get("step", -1) + 1 >= state.step:
            return True
        self._look_at_skipped()
        with self.clock.paused():
            return self._evaluate()

    def _evaluate(self) -> bool:
        """Evaluates and logs. Returns False if a stop request cut it short."""
        start, plan, total = time.perf_counter(), self.plan, self.inputs.num_eval_samples

        def stops_after(seen: int) -> bool:
            self.outputs.display.evaluating(min(seen * plan.world_size, total), total)
            return bool(self.stop_requested())

        results = evaluate(
            self.accelerator, self.updater.evaluators, self.inputs.eval_batches, total,
            sampling.num_eval_batches(total, plan.micro_batch_size, 0, plan.world_size),
            stops_after,
        )  # fmt: skip
        if not results:
            return False
        step = self.state.step - 1
        record = {"event": "eval", "step": step, "epoch": plan.epoch_of(step), **results[0]}
        if self.learner.ema:
            record |= {f"ema_{key}": results[1][key] for key in ("top1", "top5", "loss")}
        record["eval_s"] = round(time.perf_counter() - start, 2)
        self.state.last_eval = record
        self.outputs.write(record)
        self.outputs.display.eval_line(record)
        if any(result["loss"] is None for result in results):
            self.outputs.display.say(
                f"WARNING: after update {step} the loss of the evaluation is not finite, so its "
                "accuracy means nothing: weights or BatchNorm's statistics have grown too large; "
                "lower [optim] lr, or raise train.micro_batch_size"
            )
        return True

    # ---- records

    def _log_train(self) -> None:
        """Writes a train line. Waits for the device."""
        state, plan, loss_sum = self.state, self.plan, self.updater.guard.loss_sum
        self._look_at_skipped()
        images_per_s, data_wait = self.clock.lap("log")
        if not state.loss_images:  # all were skipped
            return
        loss = self._total(loss_sum) / state.loss_images
        loss_sum.zero_()
        state.loss_images = 0
        step = state.step - 1
        record = {
            "event": "train",
            "step": step,
            "epoch": plan.epoch_of(step),
            "loss": loss,
            "lr": self.lr,
            "images_per_s": round(images_per_s, 1),
            "data_wait": round(data_wait, 4),
        }
        self.outputs.write(record)
        self.outputs.display.train_line(record, self.clock.mean(), self._seconds_left())
        if self.outputs.forecast:
            self.outputs.forecast.lap(images_per_s, data_wait)

    def _seconds_left(self) -> float | None:
        """Time of the updates and evaluations to come; None while the speed is not known."""
        images_per_s, plan, step = self.clock.mean(), self.plan, self.state.step
        if not images_per_s:
            return None
        # Before the first evaluation: a forward pass takes about a third of an update.
        images = self.inputs.num_eval_samples * (2 if self.learner.ema else 1)
        eval_s = float(self.state.last_eval.get("eval_s", images / (3 * images_per_s)))
        updates_s = (plan.total_steps - step) * plan.global_batch_size / images_per_s
        return updates_s + plan.evals_left(step - 1) * eval_s

    def _log_limit(self, forecast: Forecast) -> None:
        """At the end of an epoch: writes what limited its speed."""
        step = self.state.step - 1
        epoch = self.plan.epoch_of(step)
        found = forecast.epoch(epoch, *self.clock.lap("epoch"))
        self.outputs.write({"event": "limit", "step": step, "epoch": epoch, **found})

    def _save(self, is_last: bool) -> None:
        """Saves a checkpoint.

        Raises:
            Unsaved: it could not, and this is the last one, or the failures are too many.
        """
        with self.clock.paused():
            self._look_at_skipped()
            self.state.loss_sum = self._total(self.updater.guard.loss_sum)
            fault = self._save_fault()
        if not fault:
            self.saved_step, self.failed_saves = self.state.step, 0
            return
        self.outputs.display.say(f"NOT SAVED at update {self.state.step}: {fault}")
        self.failed_saves += 1
        if is_last or self.failed_saves >= self.recipe.checkpoint.max_failures:
            raise Unsaved(
                f"the run stops, as it cannot be saved: {fault}\nthe newest state that was "
                f"saved is that of update {self.saved_step}; mend this, and the same command goes "
                "on"
            )

    def _save_fault(self) -> str:
        """Saves, with all lines that a full disk has held back. Returns the first rank's fault."""
        outputs, fault = self.outputs, ""
        try:
            for file in (outputs.metrics, outputs.samples):
                if file:
                    file.flush()
            if self.accelerator.is_main_process:
                keep = self.recipe.checkpoint.keep
                checkpoint.save(outputs.checkpoints, self.learner, outputs.about, keep)
        except OSError as error:
            fault = str(error)
        return next(filter(None, gather_object([fault])), "")

    def _close(self, seconds: float) -> dict[str, Any]:
        """Writes the closing record."""
        done = {
            **self.state.last_eval,
            "event": "done",
            "schedule_steps": self.plan.schedule_steps,
            "images_per_s": round(self.clock.lap("run")[0], 1),
            "seconds": round(seconds, 2),
        }
        if self.state.skipped_steps:
            done["skipped_steps"] = self.state.skipped_steps
        self.outputs.write(done)
        return done

    def _total(self, value: Tensor) -> float:
        """The sum of a 0-d tensor over all ranks, as a float. Waits for the device."""
        total: Tensor = self.accelerator.reduce(value.clone(), reduction="sum")
        return float(total)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    evaluators: Sequence[Evaluator],
    batches: Iterable[Batch],
    num_samples: int,
    most_batches: int = 0,
    stops_after: Callable[[int], bool] = lambda seen: False,
) -> list[dict[str, Any]]:
    """`top1`, `top5` (percent), `loss` and `seen` of each network over all ranks' batches.

    Each network is in evaluation mode meanwhile. The loss is cross-entropy without smoothing, None
    where it is not finite.

    Args:
        num_samples: that all ranks together must see.
        most_batches: of any rank. Ranks may have different numbers of batches; sums are reduced
            once, at the end.
        stops_after: is called equally often by all ranks, after each batch, with the number of
            images that this rank has seen. True ends the evaluation, and nothing is returned.
    Raises:
        RuntimeError: not every one of `num_samples` images was seen exactly once.
    """
    sums = [EvalSums(accelerator.device) for _ in evaluators]
    modules = [evaluator.module for evaluator in evaluators]
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    seen = 0
    try:
        for batch, _ in itertools.zip_longest(batches, range(most_batches)):
            for evaluator, total in zip(evaluators, sums, strict=True) if batch else ():
                with accelerator.autocast():
                    logits = evaluator(batch.images)
                total.add(logits, batch.labels)
            seen += len(batch.labels) if batch else 0
            if stops_after(seen):
                return []
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
    results = [total.result() for total in sums]
    if results[0]["seen"] != num_samples:
        raise RuntimeError(f"evaluated {results[0]['seen']:,} of {num_samples:,} images")
    return results


def _sample_record(draws: Sequence[Draw | None], step: int) -> dict[str, Any]:
    """The samples of this rank in an update, its micro-batches one after the other."""
    columns = zip(*(draw[:3] for draw in draws if draw), strict=True)
    ids, windows, flips = (np.concatenate(column).tolist() for column in columns)
    return {"event": "samples", "step": step, "ids": ids, "windows": windows, "flips": flips}

"""Builds the objects of a run, from the launched process to the trainer's inputs and outputs.

`train.train` calls these functions in the order in which they stand here.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from fasttrain import (
    alike,
    checkpoint,
    commands,
    decoder,
    decoding,
    display,
    distilling,
    forecast,
    gpus,
    heartbeat,
    layer_trials,
    loaders,
    makers,
    matching,
    measured,
    metrics,
    modes,
    run_folder,
    runtime,
    sampling,
    staging,
    stopping,
    trackers,
    trained,
    weights,
)
from fasttrain.batch import Batch, Placement, half_images
from fasttrain.config import Recipe
from fasttrain.decoder import Decoder
from fasttrain.distilling import Teach, Teacher
from fasttrain.execution import Updater
from fasttrain.faults import ConfigError
from fasttrain.forecast import Forecast, Rate, Stages
from fasttrain.heartbeat import Heartbeat
from fasttrain.learner import Learner, TrainState
from fasttrain.loop import Inputs, Outputs
from fasttrain.mixing import build_mix
from fasttrain.model import MobileNetV3, build_model
from fasttrain.order import TrainingOrder
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import Plan
from fasttrain.shards import DataSet, Split
from fasttrain.teacher_labels import StoredLabels
from fasttrain.trackers import Trackers
from fasttrain.weights import Weights

MEASURED_S = 0.8  # how long the input is measured, if no earlier run has measured it


# --------------------------------------------------------------------------------------------------
# Checks that take little time
# --------------------------------------------------------------------------------------------------


def read_weights(recipe: Recipe, classes: tuple[str, ...]) -> Weights | None:
    """Reads `model.weights` and compares them with the network.

    Returns:
        The weights; None if the recipe names none, or if the run resumes from a checkpoint.
    Raises:
        Fault: the weights are missing, damaged, or of another network.
    """
    path = run_folder.weights_to_read(recipe)
    if path is None:
        return None
    found, _ = checkpoint.open_weights(path, False, lambda text: None)
    with torch.device("meta"):
        network = build_model(**recipe.model.network(), num_classes=len(classes))
    weights.check(found, network, any_classes=True)
    return found


def read_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Teacher | None:
    """Reads `distill.teacher`, with one logit for each class of the data.

    Returns:
        The teacher on the CPU, in evaluation mode; None if the recipe names none.
    Raises:
        Fault: the weights are missing or damaged, or the teacher lacks classes of the data.
    """
    path = recipe.distill.teacher
    if path is None:
        return None
    if not path.exists():
        raise ConfigError(
            f'[distill] teacher = "{path}": there is no such file or folder; name a run folder, a '
            "checkpoint or an exported file of weights"
        )
    found, own = trained.weights_and_recipe(path, False, None, lambda text: None)
    if own is None:
        raise ConfigError(
            f'[distill] teacher = "{path}": is a file of weights that does not describe its '
            "network; name a run folder, a checkpoint or an exported file, or store the labels: "
            f"{commands.command('label')} --teacher-recipe ..."
        )
    return teacher_from(found, own, classes)


def teacher_from(found: Weights, recipe: Recipe, classes: tuple[str, ...]) -> Teacher:
    """Builds the teacher whose weights were read.

    Args:
        recipe: of the teacher's network.
        classes: of the data.
    Raises:
        Fault: the weights are of another network, or the teacher lacks classes of the data.
    """
    module = build_model(**recipe.model.network(), num_classes=len(classes))
    weights.load(found, module, partial(matching.to_evaluate, data=classes))
    module.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Teacher(str(found.path), found.digest(), module)


def try_decoders(recipe: Recipe, plan: Plan, split: Split) -> tuple[Decoder, str]:
    """Tries the decoders and chooses the fastest one that works.

    Each decoder is tried in its own process, because it may crash. Call this before this process
    uses the GPU.

    Returns:
        The decoder, and one sentence that gives the reason.
    Raises:
        DecodeError: no decoder works on this machine.
    """
    gpu, threads = gpus.has_gpu(os.environ), runtime.data_threads(recipe.data, os.environ)
    half = half_images(gpu, recipe.train.precision)
    job = decoding.Job(gpu, threads, plan.micro_batch_size, half)
    return decoding.choose_decoder(split, recipe.data, job, os.environ)


# --------------------------------------------------------------------------------------------------
# The processes
# --------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What a run learns from beside the labels. At most one of them is there."""

    stored: StoredLabels | None = None  # a teacher's labels
    teacher: Teacher | None = None

    def digests(self) -> dict[str, str]:
        """The digest of what is there, by its setting in [distill]."""
        stored, teacher = self
        return {
            **({"labels": stored.digest} if stored else {}),
            **({"teacher": teacher.digest} if teacher else {}),
        }


@dataclass(frozen=True, slots=True)
class Session:
    """What the parts of a run share on this rank, from one start to its end."""

    recipe: Recipe
    plan: Plan
    data_set: DataSet
    accelerator: Accelerator
    process: runtime.Process
    view: display.TrainDisplay
    stop: stopping.StopRequest
    lesson: Lesson

    @property
    def folder(self) -> Path:
        return run_folder.run_dir(self.recipe)

    @property
    def checkpoints(self) -> Path:
        return self.folder / run_folder.CHECKPOINTS

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device_name(self) -> str:
        return runtime.device_name(self.process.device)

    def placement(self, chosen: Decoder) -> Placement:
        """Where this rank makes its batches, with the decoder that was chosen for the run."""
        device, threads = self.process.device, self.process.data_threads
        half = half_images(device.type == "cuda", self.recipe.train.precision)
        return Placement(device, half, threads, chosen)

    def about(self) -> dict[str, Any]:
        """What a checkpoint stores about its run, except for the mode of execution."""
        train, val = self.data_set
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": train.classes,
            "data": {"train": train.digest, "val": val.digest} | self.lesson.digests(),
            "world_size": self.process.world_size,
            "cpu_threads": self.process.cpu_threads,
        }


def join(
    recipe: Recipe, plan: Plan, data_set: DataSet, start: Weights | None, lesson: Lesson
) -> Session:
    """Joins the process group, and checks that all ranks belong to one run.

    Args:
        start: the weights that the run starts from, if any.
        lesson: a teacher or its labels, if any.
    Raises:
        LaunchError: the ranks differ in code, data or settings, or their launch is faulty.
    """
    # Longer than the heartbeat's timeout, so that the heartbeat can name the rank at fault first.
    timeout = timedelta(seconds=heartbeat.START_S + recipe.train.hang_timeout_s)
    patience = stopping.Patience()
    accelerator = runtime.accelerator_for(recipe.train.precision, timeout)
    process = runtime.start(accelerator, recipe, os.environ, patience)
    accelerator.wait_for_everyone()  # so that all ranks read their clocks at the same time
    facts = alike.facts(process, recipe, [split.digest for split in data_set])
    if start:  # paths and file formats may differ between machines, the tensors may not
        facts["model.weights"] = start.digest()
    digests = lesson.digests()  # all ranks need the same names here
    facts |= {f"distill.{name}": digests.get(name) for name in ("labels", "teacher")}
    alike.check(gather_object([facts]))
    memory = metrics.used_memory(process.device)
    view = display.TrainDisplay(plan, accelerator.is_main_process, memory_gib=memory.total_gib)
    file = run_folder.run_dir(recipe) / run_folder.STOP if accelerator.is_main_process else None
    stop = stopping.StopRequest(process.world_size, file, timeout, patience, view)
    return Session(recipe, plan, data_set, accelerator, process, view, stop, lesson)


def agree_on_decoder(chosen: Decoder, why: str) -> tuple[Decoder, str]:
    """Makes all ranks use the same decoder. Takes and returns what `try_decoders` returns."""
    strategy = decoder.surest(gather_object([chosen.strategy]))
    if strategy == chosen.strategy:
        return chosen, why
    why += f"; but all ranks use {strategy}, because it works on each of them"
    return replace(chosen, strategy=strategy), why


@contextmanager
def staged(session: Session) -> Iterator[DataSet]:
    """Yields the data set that this node reads: with `data.stage`, a copy on this node.

    One rank per node makes the copy. It is removed after the run, unless `data.stage_keep` is set.

    Raises:
        ShardError: a node could not make its copy.
    """
    data, copy = session.recipe.data, None
    if not data.stage:
        yield session.data_set
        return
    if session.accelerator.is_local_main_process:
        copy = staging.Staging(data.root, data)
    staging.wait(copy, lambda report: gather_object([report]), session.view.say)
    yield DataSet(*(staging.open_copy(split, data) for split in session.data_set))
    session.accelerator.wait_for_everyone()
    if copy:
        copy.release()


def watch(session: Session) -> Heartbeat:
    """Starts the heartbeat, which ends a run that hangs and names the rank at fault."""
    return Heartbeat(
        session.process.rank,
        session.process.world_size,
        session.recipe.train.hang_timeout_s,
        partial(heartbeat.launcher_store, os.environ),
        partial(stopping.leave, heartbeat.STATUS),
    )


# --------------------------------------------------------------------------------------------------
# The network and its updates
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resume:
    """The checkpoint from which the run resumes, if there is one."""

    folder: Path | None
    earlier: modes.Earlier | None  # how it carried out updates


def find_checkpoint(session: Session) -> Resume:
    """Chooses the checkpoint for all ranks. Rank 0 also records this start in the run folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or it belongs to another run.
    """
    folder, earlier = None, None
    if session.is_main:
        resume = session.recipe.checkpoint.resume
        folder = checkpoint.choose_checkpoint(
            session.checkpoints, resume, session.about(), session.view.say
        )
        if folder:
            saved, name = checkpoint.read_state(folder), session.device_name
            if name in saved.execution:
                earlier = modes.Earlier(saved.execution[name], saved.layers.get(name))
        run_folder.begin(session.recipe, runtime.environment(session.process))
    # The broadcast also keeps the other ranks waiting until the run folder is ready.
    return Resume(*broadcast_object_list([folder, earlier]))


def build_network(session: Session, start: Weights | None) -> MobileNetV3:
    """Builds the network on its device, channels-last. Prints a summary of the run.

    Args:
        start: the weights that the run starts from; None for random weights.
    """
    recipe, plan, process, train = (
        session.recipe, session.plan, session.process, session.data_set.train,
    )  # fmt: skip
    module = build_model(**recipe.model.network(), num_classes=len(train.classes))
    said = ""
    if start:
        rule = partial(matching.to_start_from, data=train.classes)
        more = weights.load(start, module, rule)
        said = "\n".join(filter(None, ["", f"starting from {start.path}", more]))
    module.freeze(recipe.optim.frozen_stages)
    module.to(process.device).to(memory_format=torch.channels_last)
    session.view.say(
        f"MobileNetV3-{recipe.model.arch.capitalize()} {recipe.model.width:g} on "
        f"{train.num_samples:,} images of {len(train.classes):,} classes from {recipe.data.root}\n"
        f"{process.world_size} x {process.device.type} with {process.cpu_threads} CPU threads, "
        f"precision {recipe.train.precision}; "
        f"{plan.global_batch_size:,} images an update, {plan.steps_per_epoch:,} updates an epoch, "
        f"{plan.total_steps:,} in all\n{scaled_lr(recipe, plan)}run folder: {session.folder}{said}"
    )
    return module


def scaled_lr(recipe: Recipe, plan: Plan) -> str:
    """A line on the learning rate, if the batch size scales it; else ""."""
    optim = recipe.optim
    if optim.lr_scaling == "none":
        return ""
    return (
        f"peak learning rate {plan.peak_lr:.4g}: {optim.lr:g} for {optim.lr_batch:,} images an "
        f"update, scaled to {plan.global_batch_size:,} ({optim.lr_scaling})\n"
    )


def start_updates(session: Session, module: MobileNetV3, resume: Resume) -> tuple[str, Updater]:
    """Chooses the mode of execution, and restores the learner from the checkpoint.

    Returns:
        The mode, and the updater in that mode.
    Raises:
        ExecutionError: the mode that the recipe names does not work, or no mode works.
        CheckpointError: the checkpoint is damaged or does not fit the network.
    """
    num_classes, say = len(session.data_set.train.classes), session.view.say
    setup = modes.Setup(session.accelerator, module, session.recipe, session.plan, num_classes)
    mode, why = modes.choose_execution(setup, resume.earlier, say)
    say(why)

    def restore(learner: Learner) -> None:
        if resume.folder:
            checkpoint.restore(resume.folder, learner, session.about(), say)

    mode, _, updater = modes.start(mode, setup, restore, say)
    return mode, updater


# --------------------------------------------------------------------------------------------------
# The data
# --------------------------------------------------------------------------------------------------


class Input:
    """The batches of a run, and the forecast of its input speed."""

    def __init__(self, session: Session, data_set: DataSet, placement: Placement) -> None:
        """
        Args:
            data_set: what the loaders read: the copy on this node if the data set is staged.
            placement: where the loaders make the batches, and with which decoder.
        """
        self.session, self.data_set, self.placement = session, data_set, placement
        self.settings = session.recipe.data
        self.stages = Stages()
        plan, process = session.plan, session.process
        self.eval_batches = loaders.eval_loader(
            data_set.val, self.settings, plan.micro_batch_size, process.rank, process.world_size,
            placement,
        )  # fmt: skip

    def train_batches(self, step: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches, starting with those of update `step`."""
        session = self.session
        rank = session.process.rank
        order = TrainingOrder(self.data_set.train, self.settings, session.plan, rank, step)
        stored = session.lesson.stored
        return iter(loaders.Loader(order, self.placement, self.stages, stored))

    def samples_of(self, step: int) -> list[str]:
        """Describes where each sample of update `step` is stored, for all ranks."""
        plan, train = self.session.plan, self.data_set.train
        epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
        order = sampling.epoch_order(plan.seed, epoch, train, sampling.block_size(self.settings))
        first = step_of_epoch * plan.global_batch_size
        return [train.describe(int(i)) for i in order[first : first + plan.global_batch_size]]

    def start_forecast(self) -> Forecast:
        """Measures the input speed, unless an earlier run has done so, and prints it."""
        process, train = self.session.process, self.data_set.train
        keys = self._keys()
        rate = forecast.recall_rate(keys["input"])  # images/s of all ranks together
        if not all(gather_object([rate is not None])):
            rate = self._measure(keys["input"])
        assert rate
        strategy = makers.decoder_of(train, self.settings, self.placement).strategy
        speed_forecast = Forecast(
            input=rate,
            step=forecast.recall_rate(keys["step"]),
            stages=self.stages,
            advice=forecast.advice_for(train, strategy, process.data_threads),
            say=self.session.view.say,
            remember=lambda what, images_per_s: forecast.remember_rate(keys[what], images_per_s),
        )
        threads, world_size = process.data_threads, process.world_size
        speed_forecast.start(forecast.describe(train, strategy, threads, world_size))
        return speed_forecast

    def _keys(self) -> dict[str, str]:
        """The keys under which the speeds of the input and of the updates are kept."""
        process, recipe = self.session.process, self.session.recipe
        threads = process.data_threads, process.cpu_threads
        machine = (process.world_size, str(process.device), *threads)
        return {
            "input": forecast.input_key(
                self.data_set.train, self.settings, str(self.placement.decoder), *machine
            ),
            "step": measured.key_of(
                "updates", recipe.model, recipe.optim, recipe.train, self.settings.crop_px,
                recipe.distill.on, recipe.distill.teacher, self.settings.scales_px,
                self.session.plan.micro_batch_size, os.uname().nodename, *machine,
            ),
        }  # fmt: skip

    def _measure(self, key: str) -> Rate:
        """Measures the input of all ranks. Keeps the result if every rank's speed was steady."""
        session = self.session
        session.view.say("measuring the input")
        found = loaders.measure(
            self.data_set.train, self.settings, session.plan, session.process.rank,
            self.placement, MEASURED_S,
        )  # fmt: skip
        rates = gather_object([found])
        rate = Rate(sum(images_per_s for images_per_s, _ in rates))
        if all(steady for _, steady in rates):
            forecast.remember_rate(key, rate.images_per_s)
        return rate


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


def inputs_for(session: Session, run_input: Input, heartbeat: Heartbeat) -> Inputs:
    """The inputs of the trainer. The heartbeat counts each training batch as progress."""
    num_classes = len(run_input.data_set.train.classes)
    return Inputs(
        train_batches=lambda step: heartbeat.counted(run_input.train_batches(step)),
        eval_batches=run_input.eval_batches,
        num_eval_samples=run_input.data_set.val.num_samples,
        mix=build_mix(session.recipe.train, num_classes, session.recipe.distill.on),
        teach=_teach_for(session, num_classes),
    )


def _teach_for(session: Session, num_classes: int) -> Teach | None:
    """The function that adds the teacher's labels to a batch; None without a teacher."""
    stored, teacher = session.lesson
    distill = session.recipe.distill
    if stored:
        session.view.say(f"learning from {stored.about}; weight {distill.weight:g}")
        return distilling.from_stored(num_classes, distill.temperature)
    if teacher:
        session.view.say(f"learning from {teacher.name}, in the run; weight {distill.weight:g}")
        teacher.module.to(session.process.device)
        return distilling.from_teacher(teacher, session.accelerator, distill.temperature)
    return None


def outputs_for(
    session: Session, run_input: Input, mode: str, learner: Learner, resume: Resume
) -> Outputs:
    """The outputs of the trainer. Removes lines that an earlier start wrote after the checkpoint.

    Args:
        mode: the mode of execution.
        learner: is already restored from the checkpoint.
    """
    folder, state = session.folder, learner.state
    speed_forecast = run_input.start_forecast()
    if resume.folder:
        session.view.say(f"resuming from {resume.folder}")
    if session.is_main:
        run_folder.cut_lines(folder, state.step, state.last_eval.get("step", -1))
    session.accelerator.wait_for_everyone()
    samples = folder / run_folder.samples_file(session.process.rank)
    return Outputs(
        checkpoints=session.checkpoints,
        about=session.about() | how_of(session, mode, learner),
        display=session.view,
        metrics=JsonLines(folder / run_folder.METRICS) if session.is_main else None,
        trackers=_trackers_for(session, state.step) if session.is_main else None,
        samples=JsonLines(samples) if session.recipe.log.samples else None,
        forecast=speed_forecast,
        describe_samples=run_input.samples_of,
    )


def _trackers_for(session: Session, first_step: int) -> Trackers | None:
    recipe, names = session.recipe, session.recipe.log.trackers
    if not names:
        return None
    goes_on = run_folder.resume_of(recipe).expects_same_run and first_step > 0
    start = trackers.Start(recipe, session.folder, first_step, goes_on)
    return Trackers(names, start, session.view.say)


def how_of(session: Session, mode: str, learner: Learner) -> dict[str, Any]:
    """What a checkpoint stores about how updates were carried out."""
    layers = layer_trials.chosen_in(learner.module)
    name = session.device_name
    return {"execution": {name: mode}} | ({"layers": {name: layers}} if layers else {})


def stop_check(session: Session, heartbeat: Heartbeat, state: TrainState) -> Callable[[], int]:
    """Makes the function that the trainer calls once a step.

    The function counts the step for the heartbeat. It returns 0, or the exit status with which all
    ranks stop.
    """
    first_step = state.step

    def stop_requested() -> int:
        heartbeat.step(f"update {state.step}")
        return session.stop.agreed(unsaved=state.step > first_step)

    return stop_requested


def finish(session: Session, done: dict[str, Any] | None, step: int) -> None:
    """Marks a complete run as done, and prints what the user can do next.

    Args:
        done: the closing record; None if the run was stopped.
        step: the number of updates done.
    """
    folder, say = session.folder, session.view.say
    if done and session.is_main:
        run_folder.write_done(folder, done)
    if done:
        say("\n".join([display.summary(done), *_next_commands(session, step), json.dumps(done)]))
    elif session.is_main:
        saved = next(iter(checkpoint.find(session.checkpoints)), None)
        where = f"and saved as {saved}" if saved else "before the first update"
        say(f"stopped {where}; the same command resumes from there")
    if session.is_main:
        (folder / run_folder.STOP).unlink(missing_ok=True)


def _next_commands(session: Session, step: int) -> list[str]:
    """The lines that say where the weights of a complete run are, and what to do with them."""
    folder = session.folder
    tools = {
        "evaluate": f"{folder} --data {session.recipe.data.root}",
        "report": f"{folder} --out {folder / 'report.html'}",
        "export": f"{folder} {folder / 'model.onnx'}",
        "predict": f"{folder} IMAGE",
    }
    return [
        f"weights: {session.checkpoints / f'step_{step:08d}' / checkpoint.MODEL}",
        *(f"to {name}: {commands.command(name)} {words}" for name, words in tools.items()),
    ]

"""A recipe goes in, a trained network comes out; started again, it goes on where it stopped.

    accelerate launch fasttrain/train.py recipes/large.toml [--set train.epochs=90 ...]

What is wrong with the recipe, the data or the run folder is found before torch is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from fasttrain import (
    caches,
    config,
    faults,
    files,
    forecast,
    launch,
    matching,
    measured,
    reading,
    run_folder,
    sampling,
    schedule,
    shards,
    staging,
)
from fasttrain.config import Recipe
from fasttrain.faults import Fault
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import Plan
from fasttrain.shards import Split

if TYPE_CHECKING:
    from fasttrain import runtime, weights
    from fasttrain.batch import Placement
    from fasttrain.learner import Learner
    from fasttrain.model import MobileNetV3


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the recipe that the command line names."""
    recipe = config.load_or_exit(argv)
    started = False
    try:
        is_main = os.environ.get("RANK", "0") == "0"
        remarks = launch.settle(os.environ, recipe.train.precision)
        if launch.number_in(os.environ, "SLURM_RESTART_COUNT", 0):  # or it would lose its work
            again = recipe.checkpoint.model_copy(update={"resume": "auto"})
            recipe = recipe.model_copy(update={"checkpoint": again})
        world_size = launch.number_in(os.environ, "WORLD_SIZE", 1)
        done = run_folder.check(recipe)
        if done:
            if is_main:
                folder = run_folder.run_dir(recipe)
                sys.stdout.write(f"{folder} is done, nothing to do\n{json.dumps(done)}\n")
            return
        _say(*remarks, *caches.remarks())
        train_set, val_set = open_data(recipe.data)
        plan = schedule.make_plan(recipe.train, recipe.optim, train_set.num_samples, world_size)
        launch.check_processes(os.environ)
        with run_folder.locked(recipe) if is_main else contextlib.nullcontext():
            started = True
            train(recipe, plan, train_set, val_set)
    except Fault as fault:
        # Up to there all processes say the same.
        faults.stop(str(fault), everywhere=started and not fault.raised_on_every_rank)


def open_data(data: config.Data) -> tuple[Split, Split]:
    """Opens the training and validation splits."""
    look = os.environ.get("LOCAL_RANK", "0") == "0"
    train_set = shards.open_split(data.root, "train", data.short_side, look)
    val_set = shards.open_split(data.root, "val", look_at_tars=look)
    reading.check_open_files(train_set, val_set)
    return train_set, val_set


def train(recipe: Recipe, plan: Plan, train_set: Split, val_set: Split) -> None:
    """Builds everything, restores the newest checkpoint, trains, and marks the run as done."""
    # Seconds of imports, so only once the recipe is known to be right.
    _say("loading torch and DALI")
    import torch
    from accelerate.utils import broadcast_object_list, gather_object

    from fasttrain import (
        alike,
        checkpoint,
        decoding,
        display,
        gpus,
        heartbeat,
        loaders,
        loop,
        modes,
        runtime,
        stopping,
    )  # fmt: skip
    from fasttrain.batch import Batch, Placement, half_images
    from fasttrain.mixing import build_mix
    from fasttrain.model import build_model
    from fasttrain.order import TrainingOrder

    gpus.check_launch(recipe, os.environ)
    _say(*gpus.idle_gpus(os.environ))
    num_classes = len(train_set.classes)
    start = _weights_to_start_from(recipe, num_classes)
    if recipe.train.deterministic and recipe.data.decode == "auto":
        repeats = recipe.data.model_copy(update={"decode": "cpu"})
        recipe = recipe.model_copy(update={"data": repeats})
    # Before anything touches the GPU, as it tries decoders that may crash.
    gpu, threads = gpus.has_gpu(os.environ), runtime.data_threads(recipe.data, os.environ)
    half = half_images(gpu, recipe.train.precision)
    job = decoding.Job(gpu, threads, plan.micro_batch_size, half)
    input_settings, why_decode = decoding.choose_decoder(train_set, recipe.data, job, os.environ)
    # Longer than the heartbeat's, which names the process at fault.
    timeout = timedelta(seconds=heartbeat.START_S + recipe.train.hang_timeout_s)
    accelerator = runtime.accelerator_for(recipe.train.precision, timeout)
    process = runtime.start(accelerator, recipe.train, recipe.data, os.environ)
    accelerator.wait_for_everyone()  # as clocks are compared
    digests = train_set.digest, val_set.digest
    facts = alike.facts(process, recipe, digests)
    if start:  # the files may differ, as may their paths
        facts["model.weights"] = start.digest()
    alike.check(gather_object([facts]))
    decode = decoding.surest(gather_object([input_settings.decode]))
    if decode != input_settings.decode:
        why_decode += f"; but {decode} for all, as that is what works everywhere"
        input_settings = input_settings.model_copy(update={"decode": decode})
    folder = run_folder.run_dir(recipe)
    stop_file = folder / run_folder.STOP
    stop = stopping.StopRequest(
        process.world_size, stop_file if accelerator.is_main_process else None, timeout
    )
    view = display.TrainDisplay(plan, accelerator.is_main_process)
    stop.quiet, stop.say = view.quiet, view.say
    if process.follower:
        process.follower.patience_s = stop.patience_s
    copy = None
    if recipe.data.stage:
        if accelerator.is_local_main_process:
            copy = staging.Staging(recipe.data.root, recipe.data)
        staging.wait(copy, lambda report: gather_object([report]), view.say)
        train_set, val_set = (staging.open_copy(each, recipe.data) for each in (train_set, val_set))
    signs = heartbeat.Heartbeat(
        process.rank, process.world_size, recipe.train.hang_timeout_s,
        partial(heartbeat.launcher_store, os.environ), partial(stopping.leave, heartbeat.STATUS),
    )  # fmt: skip
    stop.on_step = signs.step
    root = folder / run_folder.CHECKPOINTS
    kind = runtime.device_name(process.device)
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "classes": train_set.classes,
        "data": {"train": train_set.digest, "val": val_set.digest},
        "world_size": process.world_size,
        "cpu_threads": process.cpu_threads,
    }
    newest, before = None, None
    if accelerator.is_main_process:
        newest = checkpoint.choose_checkpoint(root, recipe.checkpoint.resume, about, view.say)
        if newest:
            before = checkpoint.read_state(newest).execution.get(kind)
        run_folder.begin(recipe, runtime.environment(process))
    newest, before = broadcast_object_list([newest, before])  # when the folder is ready

    # ---- what is trained, and how
    module = build_model(**recipe.model.network(), num_classes=num_classes)
    started_from = _start_from(start, module, train_set) if start and not newest else ""
    module.freeze(recipe.optim.frozen_stages)
    module.to(process.device).to(memory_format=torch.channels_last)
    view.say(
        f"MobileNetV3-{recipe.model.arch.capitalize()} {recipe.model.width:g} on "
        f"{train_set.num_samples:,} images of {num_classes:,} classes from {recipe.data.root}\n"
        f"{process.world_size} x {process.device.type} with {process.cpu_threads} CPU threads, "
        f"precision {recipe.train.precision}; "
        f"{plan.global_batch_size:,} images an update, {plan.steps_per_epoch:,} updates an epoch, "
        f"{plan.total_steps:,} in all\nrun folder: {folder}"
    )
    if started_from:
        view.say(started_from)
    view.say(why_decode)
    setup = modes.Setup(accelerator, module, recipe, plan, num_classes)
    mode, why_mode = modes.choose_execution(setup, before, view.say)
    view.say(why_mode)

    def restore(learner: "Learner") -> None:
        if newest:
            checkpoint.restore(newest, learner, about, view.say)

    mode, learner, updater = modes.start(mode, setup, restore, view.say)
    about["execution"] = {kind: mode}

    # ---- what it is trained on
    place = Placement(process.device, half, process.data_threads)
    stages = forecast.Stages()

    def train_batches(step: int) -> Iterator[Batch]:
        order = TrainingOrder(train_set, input_settings, plan, process.rank, step)
        return iter(loaders.Loader(order, place, stages))

    eval_batches = loaders.eval_loader(
        val_set, input_settings, plan.micro_batch_size, process.rank, process.world_size, place
    )

    # ---- where it stopped, if it ran before
    outlook = _forecast(recipe, input_settings, train_set, plan, process, place, stages, view.say)
    if newest:
        view.say(f"going on from {newest}")
    state = learner.state
    signs.where = lambda: f"update {learner.state.step}"
    first_step = state.step
    stop.unsaved = lambda: learner.state.step > first_step
    if accelerator.is_main_process:
        run_folder.cut_lines(folder, state.step, state.last_eval.get("step", -1))
    accelerator.wait_for_everyone()

    # ---- go
    samples = folder / run_folder.samples_file(process.rank)
    outputs = loop.Outputs(
        checkpoints=root,
        about=about,
        display=view,
        metrics=JsonLines(folder / run_folder.METRICS) if accelerator.is_main_process else None,
        samples=JsonLines(samples) if recipe.log.samples else None,
        forecast=outlook,
        keys_of=partial(_samples_of, train_set, recipe.data, plan),
    )
    with view:
        inputs = loop.Inputs(
            lambda step: signs.counted(train_batches(step)), eval_batches, val_set.num_samples,
            build_mix(recipe.train, num_classes),
        )  # fmt: skip
        done = loop.Trainer(updater, plan, inputs, outputs, recipe, stop.agreed).fit()
    signs.close()
    if done and accelerator.is_main_process:
        files.write_text(folder / run_folder.DONE, json.dumps(done) + "\n")
    saved = next(iter(checkpoint.find(root)), None) if accelerator.is_main_process else None
    if done:
        weights = root / f"step_{state.step:08d}" / "model.safetensors"
        view.say(
            f"done: {display.result(done)}\nweights: {weights}\n"
            f"to evaluate them: python tools/evaluate.py {folder} --data {recipe.data.root}\n"
            f"{json.dumps(done)}"
        )
    else:
        where = f"and saved as {saved}" if saved else "before the first update"
        view.say(f"stopped {where}; the same command goes on from there")
    if accelerator.is_main_process:
        stop_file.unlink(missing_ok=True)
    if recipe.data.stage:
        accelerator.wait_for_everyone()
        if copy:
            copy.release()
    accelerator.end_training()
    if not done:
        raise SystemExit(stop.decision)


def _say(*lines: str) -> None:
    """Prints lines at once, before there is a display; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


def _weights_to_start_from(recipe: Recipe, num_classes: int) -> "weights.Weights | None":
    """Reads and compares `model.weights`, before anything takes long; None where a run goes on.

    Raises:
        Fault: there are none, or they are of another network.
    """
    path = run_folder.weights_to_read(recipe)
    if path is None:
        return None
    import torch

    from fasttrain import checkpoint, weights
    from fasttrain.model import build_model

    found, _ = checkpoint.open_weights(path, False, lambda text: None)
    with torch.device("meta"):
        network = build_model(**recipe.model.network(), num_classes=num_classes)
    weights.check(found, network, any_classes=True)
    return found


def _start_from(start: "weights.Weights", module: "MobileNetV3", train_set: Split) -> str:
    """Loads weights, with the rows of the data's classes; returns what a person is told."""
    from fasttrain import weights

    rule = partial(matching.to_start_from, data=train_set.classes)
    said = weights.load(start, module, rule)
    return f"starting from {start.path}" + (f"\n{said}" if said else "")


def _samples_of(train_set: Split, data: config.Data, plan: Plan, step: int) -> list[str]:
    """Where the samples of update `step` lie, of all processes."""
    epoch, place = divmod(step, plan.steps_per_epoch)
    order = sampling.epoch_order(plan.seed, epoch, train_set, sampling.block_size(data))
    first = place * plan.global_batch_size
    return [train_set.describe(int(i)) for i in order[first : first + plan.global_batch_size]]


def _forecast(
    recipe: Recipe,
    settings: config.Data,
    train_set: Split,
    plan: Plan,
    process: "runtime.Process",
    place: "Placement",
    stages: forecast.Stages,
    say: Callable[[str], None],
) -> forecast.Forecast:
    """Measures what the input gives, or remembers it, and says so."""
    from accelerate.utils import gather_object

    from fasttrain import loaders, makers

    machine = (process.world_size, str(process.device), process.data_threads, process.cpu_threads)
    keys = {
        "input": forecast.input_key(train_set, settings, *machine),
        "step": measured.key_of(
            "updates", recipe.model, recipe.optim, recipe.train, settings.crop_px,
            plan.micro_batch_size, os.uname().nodename, *machine,
        ),
    }  # fmt: skip
    rate = forecast.recall_rate(keys["input"])  # of all processes
    if not all(gather_object([rate is not None])):
        say("measuring the input")
        found, steady = loaders.measure(train_set, settings, plan, process.rank, place, seconds=0.8)
        rates = gather_object([(found, steady)])
        rate = forecast.Rate(sum(each for each, _ in rates))
        if all(steady for _, steady in rates):
            forecast.remember_rate(keys["input"], rate.images_per_s)
    assert rate
    decode = makers.decoder_of(train_set, settings, place)
    outlook = forecast.Forecast(
        input=rate,
        step=forecast.recall_rate(keys["step"]),
        stages=stages,
        advice=forecast.advice_for(train_set, decode, process.data_threads),
        say=say,
        remember=lambda what, images_per_s: forecast.remember_rate(keys[what], images_per_s),
    )
    outlook.start(forecast.describe(train_set, decode, process.data_threads, process.world_size))
    return outlook


if __name__ == "__main__":
    main()

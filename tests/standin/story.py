"""Trains in one mode on the stand-in, and prints the findings in its log as JSON.

python story.py MODE FOLDER
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import device
import torch
from accelerate import Accelerator
from torch import nn

from fasttrain import checkpoint, config, determinism, guard, loop, modes
from fasttrain.batch import Batch
from fasttrain.display import TrainDisplay
from fasttrain.execution import Updater
from fasttrain.guard import Guard
from fasttrain.learner import Learner
from fasttrain.metrics import EvalSums
from fasttrain.model import mobilenetv3_large, mobilenetv3_small, spatial_mean
from fasttrain.run_folder import JsonLines
from fasttrain.schedule import crop_px_at, make_plan

CLASSES, LOG_EVERY, STOP_AT, NEVER = 4, 5, 13, -1
RECIPE = config.Recipe(
    # 11 updates per epoch, of two micro-batches each. Images are larger in the second epoch.
    data=config.Data(crop_px=((0, 32), (1, 48)), eval_crop_px=32, eval_resize_px=36),
    optim=config.Optim(ema_decay=0.9, warmup_epochs=1),
    train=config.Train(epochs=2, global_batch_size=8, micro_batch_size=4, precision="bf16"),
    checkpoint=config.Checkpoint(every_steps=1000, keep=2, keep_best=False),
    log=config.Log(every_steps=LOG_EVERY),
)
PLAN = make_plan(RECIPE.train, RECIPE.optim, 88, 1)
ABOUT = {"recipe": {}, "classes": [], "data": {}, "world_size": 1, "cpu_threads": 1}
Start = tuple[str, Learner, Updater]


class Part(nn.Module):
    """A network with one layer of each kind: the compiler needs minutes for a whole network."""

    def __init__(self) -> None:
        super().__init__()
        whole = mobilenetv3_small(num_classes=CLASSES)
        self.features = whole.features[:2]
        self.classifier = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(spatial_mean(self.features(images)).flatten(1))


def images(size: int, px: int) -> torch.Tensor:
    shape = (size, 3, px, px)
    found = torch.zeros(shape, dtype=torch.float16, device="cuda")
    return found.to(memory_format=torch.channels_last)


def batches(step: int) -> Iterator[Batch]:
    for number in range(step, PLAN.total_steps):
        for _ in range(PLAN.accumulation):
            px = crop_px_at(PLAN.epoch_of(number), RECIPE.data.crop_px)
            labels = torch.zeros(PLAN.micro_batch_size, dtype=torch.int64, device="cuda")
            yield Batch(images(PLAN.micro_batch_size, px), labels)


def evaluation() -> list[Batch]:
    """Validation batches, of which the last is smaller."""
    sizes = (4, 4, 3)
    return [Batch(images(n, 32), torch.zeros(n, dtype=torch.int64, device="cuda")) for n in sizes]


def counted(sums: EvalSums) -> dict[str, Any]:
    """Replaces `EvalSums.result`: the stand-in counts nothing, so all 11 images count as right."""
    sums.sums.tolist()  # waits for the device, like the real function
    return {"top1": 100.0, "top5": 100.0, "loss": 0.0, "seen": 11}


def nothing_skipped(guard: Guard) -> None:
    """Replaces `Guard.read`, which would read uninitialised memory, because no kernel runs."""
    guard.number.item()  # waits for the device, like the real function


def setup_for(mode: str, execution: str) -> modes.Setup:
    accelerator = Accelerator(mixed_precision="bf16")
    train = RECIPE.train.model_copy(update={"execution": execution})
    recipe = RECIPE.model_copy(update={"train": train})
    module = (Part() if "compile" in mode else mobilenetv3_large(num_classes=CLASSES)).to("cuda")
    module.to(memory_format=torch.channels_last)
    return modes.Setup(accelerator, module, recipe, PLAN, CLASSES)


def started(mode: str, setup: modes.Setup, folder: Path, said: list[str]) -> Start:
    """Starts as train.py does, from the newest checkpoint if there is one."""

    def restore(learner: Learner) -> None:
        for newest in checkpoint.find(folder)[:1]:
            checkpoint.restore(newest, learner, ABOUT, said.append)

    return modes.start(mode, setup, restore, said.append)


def fitted(setup: modes.Setup, start: Start, folder: Path, stop_at: int) -> dict[str, Any] | None:
    """Trains until the end or until `stop_at`; logs a line "done STEP" after each update."""
    mode, learner, updater = start
    outputs = loop.Outputs(
        checkpoints=folder,
        about=ABOUT | {"execution": {"stand-in": mode}},
        display=TrainDisplay(PLAN, enabled=False),
        metrics=JsonLines(folder / "metrics.jsonl"),
    )

    def stop_requested() -> int:
        device.note(f"done {learner.state.step}")
        return 75 if learner.state.step == stop_at else 0

    inputs = loop.Inputs(batches, evaluation(), num_eval_samples=11)
    return loop.Trainer(updater, PLAN, inputs, outputs, RECIPE, stop_requested).fit()


def waits_between_log_lines(lines: list[str]) -> list[str]:
    """The host's waits in updates that need none.

    Such an update writes no metrics, and no evaluation or checkpoint follows the previous update.
    """
    found, since = [], []
    previous = None
    for line in lines:
        if line.startswith("WAIT"):
            since.append(line)
        elif line.startswith("done"):
            step = int(line.split()[1])
            due = step % LOG_EVERY == 0 or step == PLAN.total_steps
            if previous == step - 1 and not due and not (previous and PLAN.eval_due(previous)):
                found += [f"update {step}: {wait}" for wait in since]
            previous, since = step, []
    return found


def whole_run(mode: str, folder: Path) -> dict[str, Any]:
    """Trains with two image sizes, accumulation, weight average, evaluations, a stop, a resume."""
    setup, said = setup_for(mode, mode), list[str]()
    start = started(mode, setup, folder, said)
    stopped = fitted(setup, start, folder, STOP_AT)
    saved = [path.name for path in checkpoint.find(folder)]
    start[2].close()
    setup = setup_for(mode, mode)
    start = started(mode, setup, folder, said)
    resumed_at = start[1].state.step
    done = fitted(setup, start, folder, NEVER)
    start[2].close()
    lines, metrics = device.log(), folder / "metrics.jsonl"
    return {
        "mode": start[0],
        "warnings": [text for text in said if text.startswith("WARNING")],
        "stopped": stopped is None,
        "saved": saved,
        "resumed_at": resumed_at,
        "steps": start[1].state.step,
        "done": done is not None,
        "bad": [line for line in lines if line.startswith(("BAD", "beside"))],
        "waits": waits_between_log_lines(lines),
        "evaluations": sum('"eval"' in line for line in metrics.read_text().splitlines()),
        "replays": sum(line.startswith("launch graph of") for line in lines),
    }


def one_update(mode: str, folder: Path) -> dict[str, Any]:
    """Finds an update's launches outside forward and backward, and the tensors that lose a layout.

    The update has one micro-batch. The check covers the layouts of all tensors; if forward and
    backward are compiled, only those of convolutions.
    """
    setup = setup_for(mode, mode)
    plan = replace(PLAN, accumulation=1, global_batch_size=PLAN.micro_batch_size)
    setup = replace(setup, plan=plan)
    _, _, updater = started(mode, setup, folder, [])
    batch = setup.batch(plan.micro_batch_size, 32)

    def update() -> list[str]:
        device.log()
        updater.micro(*batch, is_last=True)
        updater.update(0.1)
        return device.log()

    replayed = update()
    updater.close()
    # Another updater: its graph is recorded now, while the log marks forward and backward.
    updater = _unrecorded(mode, setup)
    with (
        device.marked(updater, "loss_of", "forward"),
        device.marked(torch.autograd, "grad", "backward"),
        device.marked(torch.autograd, "backward", "backward"),
    ):
        first = update()
    updater.close()
    # In a graph mode, count the captured launches and those beside the graph's replay.
    kinds = ("launch",) if mode in ("eager", "compile", "compile_fuse") else ("captured",)
    found = device.outside(first, kinds)
    if kinds == ("captured",):
        found += [line for line in replayed if line.startswith("launch")]
    if "compile" not in mode:  # the dispatch mode would change the operators that are compiled
        updater = _unrecorded(mode, setup)
        with device.Layouts():
            first += update()
        updater.close()
    lost = [line for line in first if line.startswith("LOST")]
    return {"launches": found, "replayed": replayed, "lost": lost}


def _unrecorded(mode: str, setup: modes.Setup) -> Updater:
    learner = modes.execution.prepare(
        mode, setup.accelerator, setup.module, setup.recipe, setup.plan
    )
    return modes.execution.build(mode, setup.accelerator, learner, setup.plan, setup.recipe)


def trials(mode: str, folder: Path) -> dict[str, Any]:
    """The bytes that a trial does not give back: of tensors, and of the whole device."""
    setup = setup_for(mode, "auto")

    def taken() -> list[int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return [torch.cuda.memory_allocated(), total - free]

    modes.try_mode(mode, setup)  # libraries allocate here what they keep for good
    earlier = taken()
    trial = modes.try_mode(mode, setup)
    tensors, device_memory = (now - then for now, then in zip(taken(), earlier, strict=True))
    return {"tensors": tensors, "taken": device_memory, "fault": trial.fault}


def failing_capture(mode: str, folder: Path) -> dict[str, Any]:
    """Starts with a network that waits while it is recorded: the run must fall back and train."""
    setup, said = setup_for(mode, "auto"), list[str]()

    def wait(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.zeros(1, device="cuda").item()

    setup.module.register_forward_hook(wait)
    start = started(mode, setup, folder, said)
    fallen = {
        "mode": start[0],
        "warnings": [text for text in said if text.startswith("WARNING")],
        "on_default_stream": torch.cuda.current_stream() == torch.cuda.default_stream(),
        "bad": len([line for line in device.log() if line.startswith("BAD")]),
    }
    done = fitted(setup, start, folder, NEVER)
    later = [line for line in device.log() if line.startswith(("BAD", "beside"))]
    return fallen | {"done": done is not None, "bad_later": later}


def main(mode: str, folder: Path) -> None:
    determinism.choose_kernels(deterministic=False)
    EvalSums.result = counted  # type: ignore[method-assign, assignment]
    guard.are_equal = lambda some, others: len(some) == len(others)  # nothing is computed here
    Guard.read = nothing_skipped  # type: ignore[method-assign, assignment]
    found: dict[str, Any] = {}
    for part in (whole_run, one_update, trials, *([failing_capture] if "graph" in mode else [])):
        name = part.__name__
        (folder / name).mkdir()
        device.log()
        found[name] = part(mode, folder / name)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

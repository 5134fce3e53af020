"""What a run is and has reached, in words that a newcomer understands."""

from typing import NamedTuple

from fasttrain import matching
from fasttrain.display import duration
from reporting.runs import EvalLine, Run, Spent

# Top-1 and top-5 in percent on ImageNet, by architecture and width, after 150 epochs.
# Source: github.com/d-li14/mobilenetv3.pytorch.
PUBLISHED = {
    ("large", 1.0): (74.280, 91.928),
    ("large", 0.75): (72.842, 90.846),
    ("small", 1.0): (67.214, 87.304),
    ("small", 0.75): (64.876, 85.498),
}
DASH = "\N{EN DASH}"


class Fact(NamedTuple):
    """A figure of a run."""

    name: str
    value: str
    remark: str = ""


def published(run: Run) -> tuple[float, float] | None:
    """The published top-1 and top-5 of the run's network; None unless it is trained on ImageNet."""
    if set(run.classes) != set(matching.imagenet()):
        return None
    return PUBLISHED.get((run.recipe.model.arch, run.recipe.model.width))


def network(run: Run) -> str:
    """The name of the network: `MobileNetV3-Small 0.75`."""
    model = run.recipe.model
    return f"MobileNetV3-{model.arch.capitalize()} {model.width:g}"


def state(run: Run) -> str:
    """A sentence about the run's state and its progress."""
    total, done = run.recipe.train.epochs, run.epochs_done
    so_far = f"{done:.3g} of {total} epochs are trained"
    if run.metrics.lines and not run.epoch_known:
        so_far = f"a part of the first of {total} epochs is trained"
    sentences = {
        "done": f"Done: {so_far}.",
        "going": f"Going: {so_far}, and it trains on.",
        "stopped": f"Stopped: {so_far}. The same command resumes it.",
        "unknown": f"Not done: {so_far}. The file system does not say whether it trains on.",
    }
    return sentences[run.state]


def facts(run: Run) -> list[Fact]:
    """The figures of a run, the most important first."""
    hardware = dict.fromkeys(start.hardware for start in run.starts)
    return [
        *_accuracy(run),
        *_cost(run),
        Fact("Hardware", ", then ".join(hardware) or "unknown"),
        Fact("Data set", str(run.recipe.data.root), _classes(run)),
    ]


def _accuracy(run: Run) -> list[Fact]:
    if not run.metrics.evals:
        return [Fact("Top-1", DASH, "the run was not evaluated yet")]
    last = run.metrics.evals[-1]
    best = max(run.metrics.evals, key=lambda line: line.top1)
    found = [
        Fact("Best top-1", f"{best.top1:.2f} %", _after(run, best)),
        Fact("Last top-1", f"{last.top1:.2f} %", _after(run, last)),
        Fact("Last top-5", f"{last.top5:.2f} %", f"on {last.seen:,} images"),
    ]
    averaged = [line for line in run.metrics.evals if line.ema_top1 is not None]
    if averaged:
        best = max(averaged, key=lambda line: line.ema_top1 or 0.0)
        last = averaged[-1]
        found += [
            Fact("Best EMA top-1", f"{best.ema_top1:.2f} %", _after(run, best)),
            Fact("Last EMA top-1", f"{last.ema_top1:.2f} %", _after(run, last)),
        ]
        if last.ema_top5 is not None:
            found.append(Fact("Last EMA top-5", f"{last.ema_top5:.2f} %"))
    if figures := published(run):
        found.append(
            Fact("Published", f"{figures[0]:.2f} %", f"top-1; top-5 {figures[1]:.2f} %, 150 epochs")
        )
        found.append(_reached(run, figures[0]))
    return found


def _reached(run: Run, top1: float) -> Fact:
    """When the run, or its EMA, first had this top-1 in percent."""
    for line in run.metrics.evals:
        if max(line.top1, line.ema_top1 or 0.0) >= top1:
            time = run.clock.spent(line.time).wall_s if run.clock and line.time else None
            remark = "" if time is None else f"{duration(time)} of wall time"
            return Fact("Reached it", _after(run, line), remark)
    return Fact("Reached it", "not yet" if run.state != "done" else "no")


def _after(run: Run, line: EvalLine) -> str:
    epochs = run.epochs(line)
    return f"after {epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def _cost(run: Run) -> list[Fact]:
    spent, speed = run.spent, run.images_per_s
    found = [
        _wall_time(run, spent),
        Fact("Device-hours", f"{spent.device_s / 3600:.3g}" if spent else "unknown"),
        Fact("Speed", f"{speed:,.0f} images/s" if speed else DASH, "mean of the updates"),
    ]
    if run.metrics.skipped:
        number = sum(line.number for line in run.metrics.skipped)
        found.append(Fact("Skipped updates", f"{number:,}", "loss or gradient was not finite"))
    return found


def _wall_time(run: Run, spent: Spent | None) -> Fact:
    if spent is None:
        return Fact("Wall time", "unknown")
    form = "h:min:s" if spent.wall_s >= 3599.5 else "min:s"
    remark = f", in {len(run.starts)} starts" if len(run.starts) > 1 else ""
    if run.clock is None:
        remark += ", without the preparation"
    return Fact("Wall time", duration(spent.wall_s), form + remark)


def _classes(run: Run) -> str:
    return f"{len(run.classes):,} classes" if run.classes else ""


def limits(run: Run) -> str:
    """A sentence about what limited the speed of the epochs; "" if no epoch has ended."""
    names = [line.limit for line in run.metrics.limits]
    counts = [f"{name} in {names.count(name)}" for name in dict.fromkeys(names)]
    if not counts:
        return ""
    epochs = "epoch" if len(names) == 1 else "epochs"
    return f"Of {len(names)} {epochs}, the speed was limited by {', by '.join(counts)}."

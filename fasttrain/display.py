"""Shows progress: as a live view on a terminal, as plain lines in a log.

Nothing here reads the device. The loop passes numbers that it already has.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fasttrain.schedule import Plan

PLAIN_EVERY_S = 10.0  # between two lines of progress in a log


class _Rate(ProgressColumn):
    """The mean speed of a task: `1,234 images/s  135 MB/s`."""

    def render(self, task: Task) -> Text:
        return Text(_rates(task.completed, task.fields["num_bytes"], task.elapsed or 0.0))


def _rates(images: float, num_bytes: float, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    parts = [f"{images / seconds:,.0f} images/s"] if images else []
    return "  ".join([*parts, *([f"{num_bytes / 1e6 / seconds:,.0f} MB/s"] if num_bytes else [])])


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on standard error how many of `total` images are done.

    Yields:
        `advance(images, num_bytes)`, to be called with what was done since the last call.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total, num_bytes=0)

            def update(images: int, num_bytes: int) -> None:
                num_bytes += bar.tasks[task].fields["num_bytes"]
                bar.update(task, advance=images, num_bytes=num_bytes)

            yield update
        return
    done, done_bytes, start = 0, 0, time.monotonic()
    last = start

    def advance(images: int, num_bytes: int) -> None:
        nonlocal done, done_bytes, last
        done, done_bytes = done + images, done_bytes + num_bytes
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S or done >= total:
            last = now
            left = duration((total - done) * (now - start) / max(done, 1))
            rates = _rates(done, done_bytes, now - start)
            console.print(
                f"{what} {done:,}/{total:,}  {rates}  {left} left", soft_wrap=True, highlight=False
            )

    yield advance


def duration(seconds: float) -> str:
    """Formats seconds as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class TrainDisplay:
    """Shows a run: a few live lines on a terminal, or a line per record in a log.

    On a terminal the live lines show the current state, and the lines of evaluations stay above
    them. A log also gets the train lines. The live lines fit into 80 columns. Use it as a context
    manager. It prints nothing if `enabled` is false.
    """

    def __init__(
        self,
        plan: Plan,
        enabled: bool,
        console: Console | None = None,
        memory_gib: float | None = None,
    ) -> None:
        """
        Args:
            enabled: show anything at all.
            memory_gib: the memory that the device has.
        """
        self.plan = plan
        self.enabled = enabled
        self.memory_gib = memory_gib
        self.warned: set[str] = set()
        self.console = console or Console()
        self.num_done = 0  # updates
        self.evaluated: tuple[int, int] | None = None  # images seen and total, during an evaluation
        self.latest: dict[str, Any] = {}  # the last train record
        self.accuracy: dict[str, Any] = {}  # the last evaluation's record
        self.best: dict[str, Any] = {}  # the record of the best one
        self.begun = time.monotonic()
        self.ends_at: float | None = None  # seconds since 1970
        self.live: Live | None = None
        if enabled and self.console.is_terminal:
            self.live = Live(
                get_renderable=self._lines, console=self.console, refresh_per_second=4,
                transient=True,
            )  # fmt: skip

    def __enter__(self) -> "TrainDisplay":
        self.begun = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def step(self, num_done: int) -> None:
        """Shows that `num_done` updates are done."""
        self.num_done, self.evaluated = num_done, None

    def evaluating(self, seen: int, total: int) -> None:
        """Shows that an evaluation has seen about `seen` of `total` images."""
        self.evaluated = seen, total

    def train_line(
        self, record: dict[str, Any], mean_images_per_s: float, left_s: float | None
    ) -> None:
        """Shows a train record.

        Args:
            mean_images_per_s: speed since the start.
            left_s: seconds to the end of the run; None if not known.
        """
        self.latest = record | {"mean": mean_images_per_s}
        self.ends_at = None if left_s is None else time.time() + left_s
        if not self.live:
            parts = [self._position(record["step"] + 1), self._latest()]
            if left_s:
                parts.append(f"{duration(left_s)} left")
            self.say("  ".join(parts))

    def resumed(self, last: dict[str, Any], best: dict[str, Any]) -> None:
        """Shows the last and the best evaluation of earlier starts."""
        self.accuracy, self.best = last, best

    def eval_line(self, record: dict[str, Any], best: dict[str, Any]) -> None:
        """Shows the record of an evaluation, and the `best` record so far."""
        self.accuracy, self.best, self.evaluated = record, best, None
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        ema = f"  EMA {record['ema_top1']:.2f} %" if "ema_top1" in record else ""
        is_best = "  best so far" if best.get("step") == record["step"] else ""
        self.say(
            f"{self._epoch(record['step'] + 1)}  top-1 {record['top1']:.2f} %{ema}  "
            f"top-5 {record['top5']:.2f} %  loss {loss}  in {record['eval_s']:.1f} s{is_best}"
        )

    def say(self, text: str) -> None:
        """Prints lines, above the live view if there is one. Prints a warning once."""
        if text.startswith("WARNING"):
            if text in self.warned:
                return
            self.warned.add(text)
        if self.enabled:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def quiet(self) -> None:
        """Ends the live view, because the user may have the prompt again. `say` still works."""
        if self.live:
            self.live.stop()

    def _epoch(self, num_done: int) -> str:
        epoch, num_epochs = (
            self.plan.epoch_of(max(steps, 1) - 1) + 1 for steps in (num_done, self.plan.total_steps)
        )
        return f"epoch {epoch}/{num_epochs}"

    def _position(self, num_done: int) -> str:
        return f"{self._epoch(num_done)}  step {num_done:,}/{self.plan.total_steps:,}"

    def _latest(self) -> str:
        """Formats the last train record: loss, learning rate, speed, wait for data."""
        record = self.latest
        if not record:
            return "waiting for the first figures"
        parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.4f}"]
        if record["images_per_s"]:
            parts.append(f"{record['images_per_s']:,.0f} images/s (mean {record['mean']:,.0f})")
            parts.append(f"data wait {record['data_wait']:.0%}")
        return "  ".join(parts)

    def _accuracy(self) -> str:
        """Formats the last and the best accuracy, and the memory in use."""
        parts = ["no evaluation yet"]
        if self.accuracy:
            ema = self.accuracy.get("ema_top1")
            more = "" if ema is None else f" (EMA {ema:.2f})"
            parts = [f"top-1 {self.accuracy['top1']:.2f} %{more}"]
        if self.best:
            parts.append(f"best {self.best['top1']:.2f} % in epoch {self.best['epoch'] + 1}")
        if self.memory_gib and "memory_gib" in self.latest:
            parts.append(f"memory {self.latest['memory_gib']:.1f} of {self.memory_gib:.0f} GiB")
        return "  ".join(parts)

    def _time(self) -> str:
        """Formats the time since the start, and when the run will end."""
        text = f"{duration(time.monotonic() - self.begun)} elapsed"
        if self.ends_at is None:
            return text
        left_s = max(self.ends_at - time.time(), 0)
        return f"{text}  {duration(left_s)} left, ends at {_time_of_day(self.ends_at)}"

    def _lines(self) -> Group:
        bars = Table.grid(padding=(0, 2))
        for what, done, total in self._bars():
            share = done / max(total, 1)
            bar = ProgressBar(completed=100 * share, width=28)
            bars.add_row(what, bar, f"{done:,}/{total:,}", f"{share:.0%}")
        return Group(bars, *map(Text, (self._latest(), self._accuracy(), self._time())))

    def _bars(self) -> list[tuple[str, int, int]]:
        """Name, done and total of the epoch or the evaluation, and of the run."""
        plan, done = self.plan, self.num_done
        run = "run", done, plan.total_steps
        if self.evaluated:
            return [("evaluating", *self.evaluated), run]
        first = plan.epoch_of(max(done, 1) - 1) * plan.steps_per_epoch
        steps = min(plan.steps_per_epoch, plan.total_steps - first)
        return [(self._epoch(done), done - first, steps), run]


def summary(done: dict[str, Any]) -> str:
    """Formats a closing record in two or three lines: cost, last and best accuracy."""
    ema = f" (EMA {done['ema_top1']:.2f} %)" if "ema_top1" in done else ""
    parts = [f"done in {duration(done['seconds'])}"]
    if done["images_per_s"]:
        parts.append(f"{done['images_per_s']:,.0f} images/s")
    if "kwh" in done:
        parts.append(f"{done['kwh']:.3g} kWh of the GPUs")
    lines = [
        ", ".join(parts),
        f"last: top-1 {done['top1']:.2f} %{ema}, top-5 {done['top5']:.2f} % "
        f"on {done['seen']:,} images",
    ]
    if best := done.get("best"):
        average = ", of the moving average" if best["ema"] else ""
        lines.append(f"best: top-1 {best['top1']:.2f} % in epoch {best['epoch'] + 1}{average}")
    return "\n".join(lines)


def _time_of_day(seconds: float) -> str:
    """Formats a time as `23:41`, with the weekday if it is not today: `Sat 23:41`."""
    then, now = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%a %H:%M", then)

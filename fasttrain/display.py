"""What a person sees: a live view on a terminal, plain lines in a log.

Nothing here reads the device; numbers arrive when the loop has them anyway.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fasttrain.schedule import Plan

PLAIN_EVERY_S = 10.0  # between two lines of progress in a log


class _Rate(ProgressColumn):
    """`1,234 images/s  135 MB/s`, over the whole of a task."""

    def render(self, task: Task) -> Text:
        return Text(_rates(task.completed, task.fields["num_bytes"], task.elapsed or 0.0))


def _rates(images: float, num_bytes: float, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    parts = [f"{images / seconds:,.0f} images/s"] if images else []
    return "  ".join([*parts, *([f"{num_bytes / 1e6 / seconds:,.0f} MB/s"] if num_bytes else [])])


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on standard error how much of `total` is done; yields `advance(images, bytes)`."""
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
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class TrainDisplay:
    """The view of a run: a bar that moves every step, and a line for every record of the metrics.

    On a terminal the latest train line stands beside the bar and only evaluations stay on screen;
    in a log every line is printed. Used as a context manager; silent where `enabled` is false.
    """

    def __init__(self, plan: Plan, enabled: bool) -> None:
        self.plan = plan
        self.enabled = enabled
        self.console = Console()
        self.bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[latest]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=plan.total_steps, latest="")

    def __enter__(self) -> "TrainDisplay":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, num_done: int) -> None:
        """`num_done` updates are done."""
        if self.bar:
            self.bar.update(self.task, completed=num_done, description=self._place(num_done))

    def train_line(self, record: dict[str, Any], left_s: float) -> None:
        text = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.4f}  "
            f"{record['images_per_s']:,.0f} images/s  "
            f"waiting for data {record['data_wait']:.0%}  {duration(left_s)} left"
        )
        if self.bar:
            self.bar.update(self.task, latest=text)
        else:
            self.say(f"{self._place(record['step'] + 1)}  {text}")

    def eval_line(self, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        text = (
            f"top-1 {record['top1']:.2f} %  top-5 {record['top5']:.2f} %  "
            f"loss {loss}  on {record['seen']:,} images in {record['eval_s']:.1f} s"
        )
        if "ema_top1" in record:
            text += f"  (EMA: top-1 {record['ema_top1']:.2f} %)"
        self.say(f"{self._place(record['step'] + 1)}  {text}")

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _place(self, num_done: int) -> str:
        epoch, num_epochs = (
            self.plan.epoch_of(steps - 1) + 1 for steps in (num_done, self.plan.total_steps)
        )
        return f"epoch {epoch}/{num_epochs}  step {num_done}/{self.plan.total_steps}"

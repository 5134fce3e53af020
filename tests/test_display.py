"""The live view shows what the run does, and fits a narrow terminal."""

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from fasttrain import config
from fasttrain.display import TrainDisplay, duration, summary
from fasttrain.schedule import make_plan

PLAN = make_plan(config.Train(), config.Optim(), 1_281_167, 1)
TRAIN: dict[str, Any] = {
    "step": 187_000,
    "loss": 6.90777,
    "lr": 0.39876,
    "images_per_s": 116_370.4,
    "data_wait": 0.99,
    "memory_gib": 74.06,
}
EVAL: dict[str, Any] = {
    "step": 187_000,
    "epoch": 149,
    "top1": 74.28,
    "top5": 91.928,
    "loss": 1.08,
    "ema_top1": 74.8,
    "seen": 50_000,
    "eval_s": 4.21,
}


BEST = {"event": "best", "step": 186_000, "epoch": 148, "top1": 74.9, "ema": True}


def terminal(columns: int) -> tuple[TrainDisplay, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=columns, color_system=None)
    return TrainDisplay(PLAN, True, console, memory_gib=79.6), written


def shown(view: TrainDisplay) -> str:
    with view.console.capture() as captured:
        view.console.print(view._lines())
    return captured.get()


@pytest.mark.parametrize("columns", [80, 130])
def test_the_live_view_fits_with_the_numbers_of_imagenet(columns: int) -> None:
    view, _ = terminal(columns)
    assert shown(view).count("\n") == 5  # before the first figures
    view.step(187_001)
    view.train_line(TRAIN, 115_000.0, 40 * 3600.0)
    view.eval_line(EVAL, BEST)
    text = shown(view)
    assert text.count("\n") == 5 and max(map(len, text.splitlines())) <= columns
    for part in (
        "epoch 150/150", "602/1,251", "48%", "run", "187,001/187,650", "100%",
        "loss 6.9078", "lr 0.3988", "116,370 images/s (mean 115,000)", "data wait 99%",
        "top-1 74.28 % (EMA 74.80)", "best 74.90 % in epoch 149", "memory 74.1 of 80 GiB",
        "elapsed", "40:00:00 left, ends at ",
    ):  # fmt: skip
        assert part in text, part
    assert re.search(r"ends at \w{3} \d\d:\d\d", text)  # on another day
    view.evaluating(12_288, 50_000)
    text = shown(view)
    assert "evaluating" in text and "12,288/50,000" in text and "25%" in text
    assert max(map(len, text.splitlines())) <= columns


def test_a_log_gets_a_line_for_each_record(capsys: pytest.CaptureFixture[str]) -> None:
    view = TrainDisplay(PLAN, True)
    view.train_line(TRAIN | {"images_per_s": 0.0, "step": 0}, 0.0, None)  # of the first update
    view.train_line(TRAIN, 115_000.0, 90.0)
    view.eval_line(EVAL, BEST)
    view.eval_line(EVAL, BEST | {"step": 187_000})
    for _ in range(2):
        view.say("WARNING: once")
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/150  step 1/187,650  loss 6.9078  lr 0.3988",
        "epoch 150/150  step 187,001/187,650  loss 6.9078  lr 0.3988  "
        "116,370 images/s (mean 115,000)  data wait 99%  1:30 left",
        "epoch 150/150  top-1 74.28 %  EMA 74.80 %  top-5 91.93 %  loss 1.0800  in 4.2 s",
        "epoch 150/150  top-1 74.28 %  EMA 74.80 %  top-5 91.93 %  loss 1.0800  in 4.2 s  "
        "best so far",
        "WARNING: once",
    ]
    TrainDisplay(PLAN, False).eval_line(EVAL, BEST)
    assert not capsys.readouterr().out


def test_the_live_view_takes_no_time_of_an_update() -> None:
    view, _ = terminal(80)
    with view:
        begun = time.process_time()
        for number in range(10_000):
            view.step(number)
        assert time.process_time() - begun < 0.5  # 50 us an update; 0.3 measured


def test_a_resumed_run_shows_its_earlier_accuracy() -> None:
    view, _ = terminal(80)
    view.resumed(EVAL, BEST)
    assert "top-1 74.28 % (EMA 74.80)  best 74.90 % in epoch 149" in shown(view)


def test_the_summary_has_cost_last_and_best_accuracy() -> None:
    done: dict[str, Any] = {
        "top1": 98.888889,
        "top5": 100.0,
        "seen": 360,
        "seconds": 65.2,
        "images_per_s": 1234.5,
    }
    assert summary(done).splitlines() == [
        "done in 1:05, 1,234 images/s",
        "last: top-1 98.89 %, top-5 100.00 % on 360 images",
    ]
    done |= {"ema_top1": 97.1, "kwh": 0.01234, "best": BEST}
    assert summary(done).splitlines() == [
        "done in 1:05, 1,234 images/s, 0.0123 kWh of the GPUs",
        "last: top-1 98.89 % (EMA 97.10 %), top-5 100.00 % on 360 images",
        "best: top-1 74.90 % in epoch 149, of the moving average",
    ]
    assert duration(3723) == "1:02:03"

"""The run folder: what lies in it, and whether a command may go on there. Needs no torch.

    recipe.toml             the recipe in full
    environment.json        one entry per start: versions, hardware, commit, command
    metrics.jsonl           one line per event: train, eval, done
    samples-rank0.jsonl     with log.samples: what each update of that process was fed
    checkpoints/            step_00012512/ and so on
    DONE                    the closing event; written last

`step` in a line is the 0-based index of the last update that it speaks of.
"""

import json
from pathlib import Path
from typing import Any

from fasttrain import config
from fasttrain.config import Recipe

RECIPE = "recipe.toml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
DONE = "DONE"


def samples_file(rank: int) -> str:
    """Name of the file in which process `rank` logs what it was fed."""
    return f"samples-rank{rank}.jsonl"


def check(recipe: Recipe) -> dict[str, Any] | None:
    """Whether the recipe may run in its folder; returns the closing event if it already has.

    Raises:
        ConfigError: the folder holds a run of another recipe.
    """
    folder = run_dir(recipe)
    if (folder / RECIPE).exists():
        changed = config.differences(config.load(folder / RECIPE), recipe)
        if changed:
            raise config.ConfigError(
                "\n  ".join([f"{folder} holds a run of another recipe:", *changed])
                + "\nuse the old values, or another folder with --set log.run_dir=..."
            )
    if not (folder / DONE).exists():
        return None
    done: dict[str, Any] = json.loads((folder / DONE).read_text())
    total_steps = min(done["schedule_steps"], recipe.train.max_steps or done["schedule_steps"])
    return done if done["step"] + 1 >= total_steps else None  # max_steps may have been raised


def run_dir(recipe: Recipe) -> Path:
    """The run folder of a loaded recipe."""
    assert recipe.log.run_dir is not None
    return recipe.log.run_dir


def begin(recipe: Recipe, environment: dict[str, Any]) -> None:
    """Creates the folder, or notes another start in it. For one process of the run."""
    folder = run_dir(recipe)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    write_text(folder / RECIPE, config.dumps(recipe))
    starts = []
    if (folder / ENVIRONMENT).exists():
        starts = json.loads((folder / ENVIRONMENT).read_text())
    write_text(folder / ENVIRONMENT, json.dumps([*starts, environment], indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file so that it is never seen half-written."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def cut_lines(folder: Path, first_step: int) -> None:
    """Drops all lines at or past `first_step`, of every process: they will be written again."""
    for path in [folder / METRICS, *folder.glob("samples-rank*.jsonl")]:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _before(line, first_step)]
            write_text(path, "".join(f"{line}\n" for line in kept))


def _before(line: str, first_step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # half a line, from a process that was killed
        return False
    return bool(record["event"] != "done" and record["step"] < first_step)


class JsonLines:
    """Appends records to a file, each a line that other programs see at once."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

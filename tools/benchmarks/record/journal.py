"""The files of a record, and what its stages share."""

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks import own_process
from benchmarks.output import rounded
from benchmarks.own_process import Result
from benchmarks.record import tables
from fasttrain import files

REPO = Path(__file__).resolve().parents[3]
LEAST_S = 4.0  # the time that must be left to begin a measurement


class Record:
    """A record's files OUT/record.jsonl and OUT/record.md; lines of earlier calls are kept."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "record.jsonl"
        self.tables = out / "record.md"
        self.lines: list[dict[str, Any]] = []
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # a kill may have cut a line
                self.lines.append(json.loads(line))
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def write(self, stage: str, **fields: Any) -> None:
        """Appends a line, and writes the tables again; both are on the disk afterwards."""
        line = {"stage": stage, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        files.write_bytes(self.tables, tables.markdown(self.lines).encode())

    def of(self, stage: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of a stage that have these fields with these values."""
        return [
            line for line in self.lines
            if line["stage"] == stage and fields.items() <= line.items()
        ]  # fmt: skip


@dataclass
class Run:
    """What the stages share: the options, the record, and the time that is left."""

    arguments: argparse.Namespace
    record: Record
    stop_at: float  # when the current stage must end, by time.monotonic
    stage: str = ""

    @property
    def gpu(self) -> bool:
        return bool(self.arguments.device == "gpu")

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def left_s(self) -> float:
        """Seconds that the current stage has left."""
        return self.stop_at - time.monotonic()

    def write(self, **fields: Any) -> None:
        """Appends a line of the current stage to the record."""
        self.record.write(self.stage, **fields)

    def measure(self, job: BaseModel, part: str, needed: bool = False, **about: Any) -> Result:
        """Measures a job in its own process within the time left, and writes its line.

        Args:
            part: what `benchmark.py measure` does with the job.
            about: what the line says about the job.
        Returns:
            See `own_process.measure`; or `skipped`, where no time is left.
        Raises:
            Failed: the job is `needed`, and failed.
        """
        if self.left_s() < LEAST_S:
            result: Result = {"skipped": "no time left"}
        else:
            result = own_process.measure(job, part, self.left_s())
        rows = result.pop("rows", ())
        self.write(**{**about, **rounded(result)})
        for row in rows:
            self.write(**row)
        outcome = result.get("failed") or result.get("skipped") or "done"
        say(f"{self.stage}: {' '.join(str(value) for value in about.values())}: {outcome}")
        if needed and outcome != "done":
            raise Failed
        return result


def say(text: str) -> None:
    """Prints a line of progress on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Skip(Exception):
    """A stage cannot measure anything on this machine; the message says why."""


class Failed(Exception):
    """A stage cannot continue, because a measurement failed; the record already says so."""

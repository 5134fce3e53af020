"""Makes a page that shows one or several runs: accuracy, curves, speed, classes and mistakes.

    python tools/report.py RUN [RUN ...] --out report.html

RUN is a run folder, of a run that is done, stopped or still going. The page is one HTML file, which
needs neither a network nor other files. Its pictures are also written as PNG files into a folder
beside it: report_files/ for report.html.

What `evaluate.py RUN --data ROOT` wrote into RUN/evaluation adds classes and mistakes to the page.
The last line on standard output is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

from fasttrain import files
from fasttrain.faults import ConfigError, Fault, stop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        report(arguments.runs, arguments.out)
    except Fault as fault:
        stop(str(fault))


def report(folders: list[Path], out: Path) -> None:
    """Writes the page of these run folders, and its pictures.

    Raises:
        ConfigError: a folder holds no run, there are too many, files are damaged, a package is
            missing, or the page cannot be written.
    """
    check_place(out)
    from reporting import figures, page, runs  # after the checks that take no time

    figures.check()
    found = runs.read(folders)
    if len(found) > figures.MAX_RUNS:
        raise ConfigError(
            f"{len(found)} runs: a page shows at most {figures.MAX_RUNS}, because more colours are "
            "hard to tell apart; name fewer, or make several pages"
        )
    text, pictures = page.make(found)
    beside = pictures_of(out)
    try:
        beside.mkdir(exist_ok=True)
        for name, data in pictures.items():
            files.write_bytes(beside / name, data)
        files.write_text(out, text)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
    size = out.stat().st_size
    count = "1 run" if len(found) == 1 else f"{len(found)} runs"
    sys.stderr.write(f"{out}: {count}, {size / 1e6:.2f} MB; open it in a browser\n")
    result = {"page": str(out), "bytes": size, "pictures": str(beside), "runs": len(found)}
    sys.stdout.write(json.dumps(result) + "\n")


def pictures_of(out: Path) -> Path:
    """The folder of the page's PNG files."""
    return out.with_name(f"{out.stem}_files")


def check_place(out: Path) -> None:
    """Refuses a page that could not be written, before files are read.

    Raises:
        ConfigError: the folder of `out` is missing, or a folder or a file is in the way.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no such folder; make it")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: must be the name of a page, such as {out}/report.html")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file in it")
    if (beside := pictures_of(out)).exists() and not beside.is_dir():
        raise ConfigError(f"--out {out}: its pictures go into {beside}, which is a file; remove it")


if __name__ == "__main__":
    main()

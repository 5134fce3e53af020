"""Turns a folder of labelled photographs into the shards that fasttrain trains on.

    python tools/make_shards.py SOURCE OUT [--workers 8]

SOURCE is an ImageFolder: train/<class>/*.jpg and val/<class>/*.jpg. Every image is decoded once
before it is accepted; what cannot be decoded is listed in OUT/manifest.json and left out. The last
line on standard output is one JSON object.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fasttrain import display, shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder of photographs")
    parser.add_argument("out", type=Path, metavar="OUT", help="where to write the shards")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that decode (default: the CPUs of this machine, %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled order (default: 0)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: must not be negative")
    start = time.monotonic()
    try:
        source = shards.scan_image_folder(arguments.source)
        counts = {split: len(images) for split, images in source.splits.items()}
        say(
            f"{arguments.source}: {source.form}, {len(source.classes):,} classes, "
            + ", ".join(f"{number:,} images in {split}" for split, number in counts.items())
        )
        if source.ignored:
            say(f"ignored {source.ignored:,} files that are not images by their names")
        with display.progress(sum(counts.values()), "sharding") as advance:
            manifest = shards.write_dataset(
                source,
                arguments.out,
                seed=arguments.seed,
                workers=arguments.workers,
                on_progress=advance,
            )
    except shards.ShardError as error:
        say(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("stopped; the same command starts again")
        raise SystemExit(130) from None
    except OSError as error:
        say(f"cannot go on: {error}; then run the same command again")
        raise SystemExit(2) from None
    summary = {}
    for split, entry in manifest["splits"].items():
        for item in entry["rejected"]:
            say(f"rejected {item['name']}: {item['reason']}")
        for item in entry["repaired"]:
            say(f"re-encoded {item['name']} as RGB JPEG: was {item['reason']}")
        summary[split] = {
            "samples": entry["num_samples"],
            "shards": len(entry["shards"]),
            "rejected": len(entry["rejected"]),
            "repaired": len(entry["repaired"]),
        }
    seconds = round(time.monotonic() - start, 2)
    result = {"out": str(arguments.out), "splits": summary, "seconds": seconds}
    sys.stdout.write(json.dumps(result) + "\n")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()

"""The lines of a record as tables in Markdown, for recipes/RECORDS.md."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.output import share_of_bound

Line = dict[str, Any]


def markdown(lines: Sequence[Line]) -> str:
    """All tables, in the order of the stages."""
    parts = [*_head(lines)]
    for stage, table in TABLES.items():
        own = [line for line in lines if line["stage"] == stage]
        body = [*table(own)] if own else []
        if body:
            parts += ["", f"### {stage.capitalize()}", "", *body]
    parts += _faults(lines)
    return "\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table; none if it has no rows."""
    body = [f"| {' | '.join(map(shown, row))} |" for row in rows]
    if not body:
        return []
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]


def shown(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _head(lines: Sequence[Line]) -> Iterator[str]:
    starts = [line for line in lines if line["stage"] == "record"]
    about = starts[-1] if starts else {}
    found = _last(lines, "machine", "cpu")
    hardware = found.get("gpu") or found.get("cpu") or about.get("device", "unknown hardware")
    yield f"## Record of {about.get('time', 'unknown')[:10]}: {hardware}"
    yield ""
    if found:
        card = (
            f"{found['gpu']} ({shown(found['gpu_memory_gib'])} GiB, driver "
            f"{found.get('driver', 'unknown')}, CUDA {found.get('cuda')}, cuDNN "
            f"{found.get('cudnn')}), "
            if found.get("gpu") else ""
        )  # fmt: skip
        yield (
            f"Hardware: {card}{found['cpus']} cores of {found['cpu']}, "
            f"{shown(found['memory_gib'])} GiB of memory."
        )
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    commits = dict.fromkeys(str(line["commit"]) for line in starts if line.get("commit"))
    yield f"Versions: {versions}. Commit: {', '.join(commits) or 'unknown'}."
    yield "Made by `python tools/benchmark.py record`."


def _last(lines: Sequence[Line], stage: str, key: str) -> Line:
    return next((x for x in reversed(lines) if x["stage"] == stage and key in x), {})


def _machine(lines: Sequence[Line]) -> Iterator[str]:
    found = _last(lines, "machine", "cpu")
    hidden = {"stage", "time", "cpu", "cpus", "memory_gib", "gpu", "gpu_memory_gib", "driver",
              "cuda", "cudnn", "peak_rss_gib", "peak_pss_gib"}  # fmt: skip
    rows = [(key.replace("_", " "), value) for key, value in found.items() if key not in hidden]
    yield from table(("", ""), rows)


def _tests(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if "passed" in line:
            yield (
                f"`pytest -m gpu`: {line['passed']} passed, {line['failed']} failed, "
                f"{line['error']} errors, {line['skipped']} skipped"
                f"{'' if line.get('in_time', True) else '; the others did not end in time'}."
            )
    yield ""
    yield from table(
        ("test that failed", "what it said"),
        [(line["test"], line["failed"]) for line in lines if "test" in line],
    )


SETTING = ("arch", "batch", "px", "precision")


def _step(lines: Sequence[Line]) -> Iterator[str]:
    measured = [line for line in lines if "turn" in line]
    for arch, batch in dict.fromkeys((str(x["arch"]), x["batch"]) for x in measured):
        group = [x for x in measured if (x["arch"], x["batch"]) == (arch, batch)]
        first = group[0]
        yield (
            f"{arch.capitalize()}, batch {batch}, {first['px']} px, {first['precision']}, "
            f"channels-last, a resident batch:"
        )
        yield ""
        yield from _contestants(group)
        yield ""


def _contestants(group: Sequence[Line]) -> Iterator[str]:
    medians: dict[tuple[str, str], Line] = {}
    for name, mode in dict.fromkeys((x["name"], x["execution"]) for x in group):
        turns = [x for x in group if (x["name"], x["execution"]) == (name, mode)]
        good = [x for x in turns if "images_per_s" in x]
        if good:
            keys = ("images_per_s", "step_ms", "first_step_s", "peak_gib", "first_loss", "loss")
            values = {k: statistics.median(x[k] for x in good if k in x) for k in keys}
            medians[name, mode] = values | {"turns": len(good)}
        else:
            medians[name, mode] = {"said": turns[-1].get("failed") or turns[-1].get("skipped")}
    theirs = [m["images_per_s"] for (name, _), m in medians.items()
              if name != "fasttrain" and "images_per_s" in m]  # fmt: skip
    best = max(theirs, default=None)
    rows = [
        (
            name, mode, m.get("images_per_s") or m.get("said"), m.get("step_ms"),
            m["images_per_s"] / best if best and "images_per_s" in m else None,
            m.get("peak_gib"), m.get("first_loss"), m.get("loss"), m.get("first_step_s"),
            m.get("turns"),
        )
        for (name, mode), m in medians.items()
    ]  # fmt: skip
    yield from table(
        ("", "mode", "images/s", "ms", "over the best rival", "peak GiB", "first loss", "loss",
         "first step, s", "turns"),
        rows,
    )  # fmt: skip


def _profile(lines: Sequence[Line]) -> Iterator[str]:
    starts = [n for n, line in enumerate(lines) if "execution" in line and "step_ms" in line]
    for start in starts:
        whole = lines[start]
        following = [n for n in starts if n > start]
        rows = lines[start + 1 : following[0] if following else len(lines)]
        yield (
            f"{whole['arch'].capitalize()}, batch {whole['batch']}, `{whole['execution']}`: "
            f"{shown(whole['step_ms'])} ms an update"
            + (f", kernels {shown(whole['busy_ms'])} ms, {shown(whole['launches'])} launches; "
               f"{shown(whole['moved_gb'])} GB to move, "
               f"{shown(whole['moved_gb'] / whole['step_ms'] * 1e3 / whole['copy_gb_per_s'])} "
               "of the time at the speed of copying." if "busy_ms" in whole else ".")
        )  # fmt: skip
        yield ""
        heads = ("", "ms", "launches", "MB", "share of copying's speed")
        for kind, head in (
            ("kernel", "kernel"), ("kind", "kind"), ("bookkeeping", "of the bookkeeping"),
            ("operation", "operation"),
        ):  # fmt: skip
            body = [
                (x[kind], x["ms"], x.get("launches"), x.get("mb"), x.get("of_copy"))
                for x in rows if kind in x
            ]  # fmt: skip
            if body:
                yield from table((head, *heads[1:]), body)
                yield ""


def _operators(lines: Sequence[Line]) -> Iterator[str]:
    """Times of the fused kernels' operators, the worst share of a copy's speed first."""
    rows = sorted((x for x in lines if "direction" in x), key=lambda x: x.get("of_copy", 0))
    yield from table(
        ("layer", "", "channels", "px", "ours, us", "second tile, us", "compiled, us", "conv, us",
         "GB/s", "share of copying's speed"),
        [
            (
                f"{x['kind']} {x['kernel']}/{x['stride']}", x["direction"],
                " > ".join(map(str, x["channels"])), " > ".join(map(str, x["px"])),
                x.get("ours_us") or x.get("failed"), x.get("second_us"), x.get("compiled_us"),
                x.get("conv_us"), x.get("gb_per_s"), x.get("of_copy"),
            )
            for x in rows
        ],
    )  # fmt: skip


def _traffic(lines: Sequence[Line]) -> Iterator[str]:
    counted = [line for line in lines if "bound_ms" in line]
    heads = {
        "name": "plan", "forward_mb": "forward, MB an image", "backward_mb": "backward",
        "mb_per_image": "together", "kept_gib": "kept, GiB", "bound_ms": "bound, ms",
        "bound_images_per_s": "bound, images/s",
        "same_share_images_per_s": "at the same share, images/s",
        "by_kind_images_per_s": "by kind, images/s",
    }  # fmt: skip
    for arch, batch in dict.fromkeys((x["arch"], x["batch"]) for x in counted):
        group = [x for x in lines if (x.get("arch"), x.get("batch")) == (arch, batch)]
        rows = {x["name"]: x for x in group if "bound_ms" in x}  # the latest of each plan
        yield f"{arch.capitalize()}, batch {batch}, counted:"
        yield ""
        known = [key for key in heads if any(key in row for row in rows.values())]
        yield from table(
            [heads[key] for key in known],
            [[row.get(key) for key in known] for row in rows.values()],
        )
        yield ""
        yield from (f"- {share_of_bound(x)}" for x in group if "of_bound" in x)
        yield ""


def _input(lines: Sequence[Line]) -> Iterator[str]:
    measured = [line for line in lines if "decode" in line]
    yield from table(
        ("data", "stored", "KB an image", "decode", "load", "fancy", "batch", "images/s",
         "cores busy", "GPU GiB beside torch's", "first batch, s"),
        [
            (
                x["data"], x["store"], x["kb_per_image"],
                f"by {x['raw_by']}" if x.get("raw_by") else x["decode"], x["load"],
                "yes" if x.get("fancy") else "no", x["batch"],
                x.get("images_per_s") or x.get("failed") or x.get("skipped"), x.get("cores_busy"),
                x.get("gpu_beside_gib"), x.get("first_batch_s"),
            )
            for x in measured
        ],
    )  # fmt: skip
    yield ""
    yield from _packed(lines)


def _packed(lines: Sequence[Line]) -> Iterator[str]:
    """A line for each data set: the parts of the path of raw images, each alone."""
    hidden = {"stage", "time", "data", "store", "kb_per_image", "mpx_per_image", "batch",
              "peak_rss_gib", "peak_pss_gib"}  # fmt: skip
    for line in lines:
        if "gather_images_per_s" in line:
            parts = [f"{k.replace('_', ' ')} {shown(v)}" for k, v in line.items()
                     if k not in hidden]  # fmt: skip
            yield f"- {line['data']}, batch {line['batch']}, alone: {', '.join(parts)}"


def _loop(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if "name" in line:
            said = line.get("images_per_s") or line.get("failed") or line.get("skipped")
            unit = " images/s" if "images_per_s" in line else ""
            yield f"- {line['name']}, `{line['execution']}`: {shown(said)}{unit}"
        elif "loop_over_step" in line:
            yield f"- the loop over the bare update: {line['loop_over_step']}"


def _train(lines: Sequence[Line]) -> Iterator[str]:
    speeds = [x for x in lines if "data_wait" in x]
    yield from table(
        ("", "mode", "batch", "px", "images/s", "over the bare step", "share waited for data"),
        [
            (
                "after the resume" if x["resumed"] else "from the start", x["execution"],
                x["batch"], x["px"], x["images_per_s"], x.get("over_bare_step"), x["data_wait"],
            )
            for x in speeds
        ],
    )  # fmt: skip
    yield ""
    for x in lines:
        if "eval_s" in x:
            yield f"- evaluation after update {x['step']}: {x['eval_s']} s"
        if "stopping_s" in x:
            resumed = (
                f"the first train line after {x['resumed_s']} s, and {x['steps']} of "
                f"{x['of_steps']} updates in all"
                if x["resumed_s"] else "nothing, as all was done when it stopped"
            )  # fmt: skip
            yield f"- ended {x['stopping_s']} s after the request to stop; started again: {resumed}"
        for text in x.get("said", ()):
            yield f"- {text}"


def _imagenette(lines: Sequence[Line]) -> Iterator[str]:
    for x in lines:
        if "goal" in x:
            yield f"- {x['goal']:g} % top-1 after {x['minutes']} minutes from the launch"
        elif "best_top1" in x:
            yield (
                f"- best {shown(x['best_top1'])} % after {x['epochs']} evaluations, "
                f"{x['minutes']} minutes, up to {shown(x['images_per_s'])} images/s; the recipe "
                f"with {x['changes']}"
            )


def _faults(lines: Sequence[Line]) -> list[str]:
    """Everything that failed, was skipped or was stopped, with the last lines of its error."""
    found = []
    for line in lines:
        if line["stage"] == "tests" and "test" in line:
            continue
        outcome = line.get("failed") if isinstance(line.get("failed"), str) else None
        outcome = outcome or line.get("skipped") or (
            "stopped from outside" if line.get("ended") == "stopped" else None
        )  # fmt: skip
        if not isinstance(outcome, str):
            continue
        keys = ("name", "execution", "arch", "batch", "data", "decode", "load")
        what = " ".join(str(line[key]) for key in keys if line.get(key) is not None)
        found.append(f"- {line['stage']} {what}: {outcome}".replace(" :", ":"))
        if line.get("error"):
            found += ["", "  ```text", *(f"  {t}" for t in line["error"].splitlines()), "  ```", ""]
    return ["", "### What failed or was left out", "", *found] if found else []


TABLES = {
    "machine": _machine,
    "tests": _tests,
    "step": _step,
    "profile": _profile,
    "operators": _operators,
    "traffic": _traffic,
    "input": _input,
    "loop": _loop,
    "train": _train,
    "imagenette": _imagenette,
}

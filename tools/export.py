"""Writes a trained network in a form that other programs read.

    python tools/export.py CHECKPOINT OUT

CHECKPOINT is a run folder, a checkpoint, or a file of weights (.safetensors or .pth; --recipe then
describes the network). The suffix of OUT says the form:

    .safetensors    the tensors
    .pth            the tensors, as d-li14/mobilenetv3.pytorch publishes them
    .onnx           a model for ONNX runtimes, for batches of any size
    .pt2            a program of torch.export, for batches of any size
    .pte            a program of ExecuTorch (XNNPACK), for one image
    none            a folder for the Hugging Face Hub, with a model card

Every form holds the class names, the preprocessing and the accuracy of the run where it is known.
The written file is opened again, compared with PyTorch on random images, and timed. OUT appears
only if the logits agree. The last line on standard output is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain import config, shards
from fasttrain.arguments import add_precise_bn, positive
from fasttrain.faults import ConfigError, Fault, stop

if TYPE_CHECKING:
    from fasttrain.model import MobileNetV3
    from fasttrain.trained import Trained

SUFFIXES = (".safetensors", ".pth", ".onnx", ".pt2", ".pte", "")
QUANTISED = (".onnx", ".pt2", ".pte")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT", help="its suffix says the form")
    parser.add_argument("--recipe", type=Path, help="the recipe of the network and its image size")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights of the last update, not their moving average",
    )
    add_precise_bn(parser.add_argument_group("Precise BN"))
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of the timing (default: torch's)"
    )
    int8 = parser.add_argument_group("8-bit integers (.onnx, .pt2, .pte)")
    int8.add_argument("--int8", action="store_true", help="quantise weights and activations")
    int8.add_argument("--data", type=Path, metavar="ROOT", help="folder of the shards, for --int8")
    int8.add_argument(
        "--calibration-images",
        type=positive,
        metavar="N",
        default=256,
        help="training images that give the ranges of activations (default: %(default)s)",
    )
    push = parser.add_argument_group("the Hugging Face Hub (OUT is a folder)")
    push.add_argument("--push", metavar="USER/NAME", help="upload the folder")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    arguments = parser.parse_args()
    try:
        check(arguments)
        result = export(arguments)
    except Fault as fault:
        stop(str(fault))
    except OSError as error:
        stop(f"{arguments.out}: cannot be written ({error.strerror or error})")
    sys.stdout.write(json.dumps(result) + "\n")


def check(arguments: argparse.Namespace) -> None:
    """Checks the arguments, before torch is imported.

    Raises:
        Fault: they do not fit each other or what is on the disk.
    """
    out: Path = arguments.out
    if out.suffix not in SUFFIXES:
        known = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise ConfigError(
            f"{out}: the suffix {out.suffix} is no form; use {known}, or no suffix for a folder"
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it first")
    if out.suffix and out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file, or a folder without a suffix")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} exists; choose another name, or replace it with --overwrite")
    if not out.suffix and out.is_file():
        raise ConfigError(f"{out} is a file; name a new folder, or add the suffix of a form")
    if arguments.int8 and out.suffix not in QUANTISED:
        raise ConfigError(f"--int8: only {', '.join(QUANTISED)} can be quantised; rename {out}")
    if arguments.int8 and arguments.data is None:
        raise ConfigError(
            "--int8: needs --data ROOT, images to calibrate on and to measure the accuracy"
        )
    if arguments.data is not None and not arguments.int8:
        raise ConfigError("--data: only --int8 reads images; add --int8 or leave --data out")
    if (arguments.push or arguments.private) and out.suffix:
        raise ConfigError(f"--push: the Hub takes a folder; give OUT without the suffix of {out}")
    if arguments.private and not arguments.push:
        raise ConfigError("--private: add --push USER/NAME")
    for root in filter(None, (arguments.data, arguments.precise_bn)):
        shards.check_unchanged(root)


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes, checks and times the network. Returns the result for the last line.

    Raises:
        Fault: the network cannot be read, a package is missing, or the written logits are wrong.
    """
    import torch
    from exporting import hub, measure

    from fasttrain import deployed, trained

    out: Path = arguments.out
    for what in (out.suffix or "hub", "int8" if arguments.int8 else ""):
        deployed.need(what)
    if arguments.push:
        hub.check_name(arguments.push)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = config.load(arguments.recipe) if arguments.recipe else None
    found = trained.open_trained(arguments.checkpoint, not arguments.no_ema, recipe, say)
    network, px = trained.build(found), found.description.preprocessing.crop_px
    which = "the moving average of the weights" if found.weights.average else "the weights"
    say(f"{found.description.network} with {found.description.num_classes:,} classes")
    say(f"writing {which} in {found.weights.path} to {out}")
    result: dict[str, Any] = {"form": out.suffix or "folder", "path": str(out)}
    if arguments.precise_bn:
        found, used = with_precise_bn(found, network, arguments)
        result["precise_bn_images"] = used
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / (out.name or "folder")
        result |= write(arguments, found, network, made)
        written = deployed.open_network(made, True, None, say)
        difference = measure.difference(network, written.logits, px)
        result["max_difference"] = difference.largest
        say(
            f"largest difference from PyTorch's logits on random images: {difference.largest:.2g} "
            f"(largest logit {difference.scale:.2g})"
        )
        if not difference.is_small and not arguments.int8:
            raise ConfigError(
                f"{out} is not written: its logits differ from PyTorch's by "
                f"{difference.largest:.2g}; please report this with the versions that "
                "python tools/doctor.py prints"
            )
        result |= timed(network, written, px)
        place(made, out)
    if arguments.push:
        result["pushed"] = hub.push(out, arguments.push, arguments.private)
        say(f"uploaded to {result['pushed']}")
    return result


def with_precise_bn(
    found: "Trained", network: "MobileNetV3", arguments: argparse.Namespace
) -> tuple["Trained", int]:
    """Measures the statistics of the network's BatchNorms anew.

    Returns:
        The description without the accuracy, which the run measured with other statistics; and the
        number of images that were used.
    """
    from exporting import int8

    from fasttrain import precise_bn

    root = arguments.precise_bn
    data, placement = int8.on_cpu(root, found.description)
    split = shards.open_split(root, "train")
    used = precise_bn.measure(network, split, data, placement, arguments.precise_bn_images)
    say(f"BatchNorm's statistics: measured on {used:,} training images of {root}")
    described = found.description.model_copy(update={"top1": None, "top5": None})
    return found._replace(description=described), used


def write(arguments: argparse.Namespace, found: Any, network: Any, made: Path) -> dict[str, Any]:
    """Writes the form to a new file or folder, quantised if that was asked for.

    Returns:
        The number of bytes, which weights were taken, and the accuracy if it was measured.
    """
    from exporting import forms, hub, int8

    from fasttrain import deployed

    described = found.description
    result: dict[str, Any] = {}
    if not made.suffix:
        hub.write(found, network, made, arguments.push)
    elif not arguments.int8:
        forms.FORMS[made.suffix](network, described, made)
    else:
        images = int8.Images(arguments.data, described)
        calibration = images.for_calibration(arguments.calibration_images)
        say(f"calibrating on {sum(map(len, calibration)):,} training images")
        small = int8.quantised(network, described, calibration, made.suffix)
        plain = described.model_copy(update={"top1": None, "top5": None})
        forms.FORMS[made.suffix](small, plain, made)
        written = deployed.open_network(made, True, None, say)
        before, after = images.accuracies([network, written.logits])
        say(
            f"top-1 {before['top1']:.2f} % in float32, {after['top1']:.2f} % in 8 bits, on "
            f"{after['seen']:,} validation images"
        )
        result = {
            "top1_float32": before["top1"],
            "top1_int8": after["top1"],
            "seen": after["seen"],
            "calibration_images": sum(map(len, calibration)),
        }
        measured = described.model_copy(update={key: after[key] for key in ("top1", "top5")})
        forms.FORMS[made.suffix](small, measured, made)
    every = [made] if made.suffix else made.iterdir()
    num_bytes = sum(path.stat().st_size for path in every)
    return {"bytes": num_bytes, "average": described.average, **result}


def timed(network: Any, written: Any, px: int) -> dict[str, Any]:
    """Times PyTorch and the written form on one image."""
    import torch
    from exporting import measure

    own, other = (measure.latency_ms(each, px) for each in (network, written.logits))
    threads = torch.get_num_threads()
    say(
        f"one image of {px} px on {threads} CPU thread{'s' if threads > 1 else ''}: "
        f"{other:.1f} ms, PyTorch {own:.1f} ms (medians)"
    )
    return {
        "latency_ms": round(other, 3),
        "torch_latency_ms": round(own, 3),
        "threads": threads,
    }


def place(made: Path, out: Path) -> None:
    """Moves the finished file or folder to OUT, where it appears whole.

    Raises:
        OSError: the file system refused.
        ConfigError: OUT is a folder with other files.
    """
    from exporting import hub

    from fasttrain import files

    if out.suffix:
        files.write_bytes(out, made.read_bytes())
        return
    if out.exists():
        hub.remove(out)
    files.write_folder(out, {path.name: path.read_bytes() for path in made.iterdir()})


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()

"""Times the 1 x 1 layers of a small network on the stand-in, and prints what was seen as JSON.

python passes.py
"""

import json

import device
import torch

from fasttrain import layer_trials
from fasttrain.model import SMALL, MobileNetV3


def main() -> None:
    network, _ = layer_trials.candidates(MobileNetV3(SMALL[:2], 0.35, 16, 4, 0.2).cuda())
    warnings: list[str] = []
    device.log()
    # Each launch takes 1 ms on the stand-in, so no kernel is faster.
    chosen = layer_trials.choose(network, (2, 32), torch.bfloat16, None, warnings.append)
    lines = [line.split()[0] for line in device.log()]
    print(json.dumps({"chosen": chosen, "warnings": warnings, "graphs": lines.count("graph")}))


if __name__ == "__main__":
    main()

"""MobileNetV3 of d-li14/mobilenetv3.pytorch in float64 NumPy, inference only: the tests' reference.

Written from the description of the network alone, by another hand than `fasttrain/model.py`, and
shares nothing with it. Its convolution was checked against textbook loops to 2e-14.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# kernel, t, c, use_se, use_hs, stride
# fmt: off
ROWS = {
    "large": [
        (3, 1, 16, 0, 0, 1), (3, 4, 24, 0, 0, 2), (3, 3, 24, 0, 0, 1),
        (5, 3, 40, 1, 0, 2), (5, 3, 40, 1, 0, 1), (5, 3, 40, 1, 0, 1),
        (3, 6, 80, 0, 1, 2), (3, 2.5, 80, 0, 1, 1), (3, 2.3, 80, 0, 1, 1),
        (3, 2.3, 80, 0, 1, 1), (3, 6, 112, 1, 1, 1), (3, 6, 112, 1, 1, 1),
        (5, 6, 160, 1, 1, 2), (5, 6, 160, 1, 1, 1), (5, 6, 160, 1, 1, 1),
    ],
    "small": [
        (3, 1, 16, 1, 0, 2), (3, 4.5, 24, 0, 0, 2), (3, 3.67, 24, 0, 0, 1),
        (5, 4, 40, 1, 1, 2), (5, 6, 40, 1, 1, 1), (5, 6, 40, 1, 1, 1),
        (5, 3, 48, 1, 1, 1), (5, 3, 48, 1, 1, 1), (5, 6, 96, 1, 1, 2),
        (5, 6, 96, 1, 1, 1), (5, 6, 96, 1, 1, 1),
    ],
}
# fmt: on
HEAD = {"large": 1280, "small": 1024}


def make_divisible(v: float, divisor: int = 8) -> int:
    new = max(divisor, int(v + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * v else new


def plan(arch: str, width: float, num_classes: int = 1000) -> Iterator[tuple]:
    """The network as a flat list of steps; those with parameters carry their name.

    ("conv", name, cin, cout, k, stride, groups) ("bn", name, c) ("linear", name, i, o)
    ("hs",) ("relu",) ("se", name, c, reduced) ("push",) ("add",) ("pool",)
    """
    cin = make_divisible(16 * width)
    yield from (("conv", "features.0.0", 3, cin, 3, 2, 1), ("bn", "features.0.1", cin), ("hs",))
    hidden = 0
    for i, (k, t, c, use_se, use_hs, stride) in enumerate(ROWS[arch], start=1):
        p = f"features.{i}.conv."
        hidden, cout = make_divisible(cin * t), make_divisible(c * width)
        act = ("hs",) if use_hs else ("relu",)
        residual = stride == 1 and cin == cout
        at = 3 if cin == hidden else 5
        se = [("se", f"{p}{at}.fc", hidden, make_divisible(hidden // 4))] if use_se else []
        if residual:
            yield ("push",)
        if cin == hidden:
            yield from (("conv", p + "0", hidden, hidden, k, stride, hidden),)
            yield from (("bn", p + "1", hidden), act, *se)
            yield from (("conv", p + "4", hidden, cout, 1, 1, 1), ("bn", p + "5", cout))
        else:
            yield from (("conv", p + "0", cin, hidden, 1, 1, 1), ("bn", p + "1", hidden), act)
            yield from (
                ("conv", p + "3", hidden, hidden, k, stride, hidden),
                ("bn", p + "4", hidden),
            )
            yield from (*se, act)
            yield from (("conv", p + "7", hidden, cout, 1, 1, 1), ("bn", p + "8", cout))
        if residual:
            yield ("add",)
        cin = cout
    yield from (("conv", "conv.0", cin, hidden, 1, 1, 1), ("bn", "conv.1", hidden), ("hs",))
    yield ("pool",)
    units = make_divisible(HEAD[arch] * width) if width > 1 else HEAD[arch]
    yield from (("linear", "classifier.0", hidden, units), ("hs",))
    yield ("linear", "classifier.3", units, num_classes)


def shapes(arch: str, width: float, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer, in the order of the modules."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, i: int, o: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (o, i), (o,)

    for kind, *rest in plan(arch, width, num_classes):
        if kind == "conv":
            name, i, o, k, _, groups = rest
            found[f"{name}.weight"] = (o, i // groups, k, k)
        elif kind == "bn":
            name, c = rest
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.{leaf}"] = (c,)
            found[f"{name}.num_batches_tracked"] = ()
        elif kind == "se":
            name, c, reduced = rest
            linear(f"{name}.0", c, reduced)
            linear(f"{name}.2", reduced, c)
        elif kind == "linear":
            linear(*rest)
    return found


def formula(name: str, shape: tuple[int, ...]) -> Array:
    """Values by formula; `k * k % 65521` keeps the matrices from having rank two."""
    k = np.arange(int(np.prod(shape)), dtype=np.int64)
    phase = 0.7 * sum(name.encode()) + 0.37 * (k * k % 65521)
    if name.endswith("running_var"):
        values = 1.0 + 0.5 * np.sin(phase) ** 2
    elif name.endswith("running_mean"):
        values = 0.1 * np.sin(phase)
    elif name.endswith("num_batches_tracked"):
        values = np.zeros(1)
    elif name.endswith(".weight") and len(shape) == 1:
        values = 1.0 + 0.2 * np.sin(phase)
    elif name.endswith(".bias"):
        values = 0.1 * np.sin(phase)
    else:
        values = np.sin(phase) * np.sqrt(2.0 / np.prod(shape[1:]))
    return values.reshape(shape)


def formula_images(number: int, px: int) -> Array:
    k = np.arange(3 * px * px, dtype=np.int64)
    phase = 0.01 * (k * k % 65521)[None] + 0.5 * np.arange(number)[:, None]
    return np.sin(phase).reshape(number, 3, px, px)


def conv2d(x: Array, w: Array, stride: int, groups: int) -> Array:
    """Cross-correlation, zero padding (k - 1) // 2; dense (groups 1) or depthwise."""
    b, c, h, wd = x.shape
    o, _, k, _ = w.shape
    pad = (k - 1) // 2
    oh, ow = (h + 2 * pad - k) // stride + 1, (wd + 2 * pad - k) // stride + 1
    xp = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    y = np.zeros((b, o, oh, ow))
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (oh - 1) * stride + 1, stride)
            columns = slice(j, j + (ow - 1) * stride + 1, stride)
            tap = xp[:, :, rows, columns]
            if groups == 1:
                y += np.matmul(w[:, :, i, j], tap.reshape(b, c, oh * ow)).reshape(b, o, oh, ow)
            else:
                y += w[None, :, 0, i, j, None, None] * tap
    return y


def hard_sigmoid(x: Array) -> Array:
    return np.clip(x + 3.0, 0.0, 6.0) / 6.0


def logits(arch: str, width: float, state: dict[str, Array], images: Array) -> Array:
    x = images
    saved = images

    def linear(values: Array, name: str) -> Array:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for kind, *rest in plan(arch, width, state["classifier.3.weight"].shape[0]):
        if kind == "conv":
            name, _, _, _, stride, groups = rest
            x = conv2d(x, state[f"{name}.weight"], stride, groups)
        elif kind == "bn":
            leaves = ("weight", "bias", "running_mean", "running_var")
            g, b, m, v = (state[f"{rest[0]}.{leaf}"][None, :, None, None] for leaf in leaves)
            x = (x - m) / np.sqrt(v + 1e-5) * g + b
        elif kind == "hs":
            x = x * hard_sigmoid(x)
        elif kind == "relu":
            x = np.maximum(x, 0.0)
        elif kind == "se":
            squeezed = np.maximum(linear(x.mean(axis=(2, 3)), f"{rest[0]}.0"), 0.0)
            x = x * hard_sigmoid(linear(squeezed, f"{rest[0]}.2"))[:, :, None, None]
        elif kind == "push":
            saved = x
        elif kind == "add":
            x = x + saved
        elif kind == "pool":
            x = x.mean(axis=(2, 3))
        else:
            x = linear(x, rest[0])
    return x

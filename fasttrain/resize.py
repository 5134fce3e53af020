"""Windows of pixels -> a normalised batch, on the CPU.

DALI resizes and normalises an image on a CPU in about 1.8 ms, torch's uint8 kernel with what is
below in 0.4 ms (224 px, AMD EPYC without AVX-512, 2026-11-24), with PIL's pixels to a step of
1/255 (bicubic: up to 8 steps in single pixels). So on a CPU DALI decodes the windows, and the rest
is done here.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1], as everybody uses them
STD = (0.229, 0.224, 0.225)
CHUNK = 8  # images that one task takes on


class Recycler:
    """Memory of batches, used again once nobody holds the batch.

    The pages of a fresh 150 MB batch cost as much time as resizing its images.
    """

    def __init__(self) -> None:
        self.free: deque[NDArray[np.uint8]] = deque()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor."""
        num_bytes = 4 * int(np.prod(shape))
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if not num_bytes <= len(memory) <= 2 * num_bytes:
            memory = np.empty(num_bytes, np.uint8)
        lent = memory[:num_bytes].view(np.float32).reshape(shape)
        # The tensor's storage, and so every view of it, holds `lent`; it dies with the last one.
        weakref.finalize(lent, self.free.append, memory).atexit = False
        return torch.from_numpy(lent)


class Resizer:
    """Resizes, mirrors and normalises batches of windows in `threads` threads."""

    def __init__(self, threads: int, interpolation: str) -> None:
        self.interpolate = {
            "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
            "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
        }[interpolation]
        self.recycler = Recycler()
        self.scratch = _Scratch()
        # Of torch, a thread gets one thread: images are enough to share out. What is set by a
        # thread becomes what later threads begin with, so it is set back.
        before, ready = torch.get_num_threads(), threading.Barrier(threads + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # the first call of a thread takes over what is set
            ready.wait()

        self.pool = ThreadPoolExecutor(threads, "resize")
        for _ in range(threads):
            self.pool.submit(begin)
        ready.wait()
        torch.set_num_threads(before)

    def start(
        self, windows: Sequence[NDArray[np.uint8]], flips: NDArray[np.bool_], out_px: int
    ) -> "Pending":
        """Begins a batch of windows uint8 `(h, w, 3)` of any sizes and strides."""
        images = self.recycler.empty(len(windows), out_px, out_px * 3)
        starts = range(0, len(windows), CHUNK)
        parts = [slice(start, start + CHUNK) for start in starts]
        tasks = [self.pool.submit(self._work, windows[p], flips[p], images[p]) for p in parts]
        return Pending(images, tasks)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _work(
        self, windows: Sequence[NDArray[np.uint8]], flips: NDArray[np.bool_], images: Tensor
    ) -> None:
        size = images.shape[1]
        resized, scale, shift = self.scratch.of_size(size)
        for window, flip, image in zip(windows, flips.tolist(), images, strict=True):
            source = torch.from_numpy(self.scratch.contiguous(window)).permute(2, 0, 1)[None]
            self.interpolate(source, [size, size], False, None, None, out=resized)
            pixels = resized[0].permute(1, 2, 0)  # (S, S, 3)
            if flip:
                pixels = pixels.flip(1)
            # Rows of S * 3 values in one piece are what torch has vector code for.
            torch.mul(pixels.reshape(size, size * 3), scale, out=image).add_(shift)


class _Scratch(threading.local):
    """What each thread keeps from image to image."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.sizes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of_size(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for a resized image uint8 `(1, 3, S, S)`; scale and shift of rows float `(3 S,)`."""
        if size not in self.sizes:
            mean, std = 255 * torch.tensor(MEAN), 255 * torch.tensor(STD)
            resized = torch.empty(1, 3, size, size, dtype=torch.uint8)
            resized = resized.contiguous(memory_format=torch.channels_last)
            self.sizes[size] = resized, (1 / std).repeat(size), (-mean / std).repeat(size)
        return self.sizes[size]

    def contiguous(self, window: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The window in one piece, if need be as a copy that lives until the next call."""
        if window.flags.c_contiguous and window.flags.writeable:  # torch takes nothing read-only
            return window
        if len(self.memory) < window.size:
            self.memory = np.empty(2 * window.size, np.uint8)
        copy = self.memory[: window.size].reshape(window.shape)
        np.copyto(copy, window)
        return copy


class Pending:
    """A batch that threads work on."""

    def __init__(self, images: Tensor, tasks: list[Future[None]]) -> None:
        self.images = images
        self.tasks = tasks

    def result(self) -> Tensor:
        """Images float32 `(B, 3, S, S)`, channels_last, normalised; waits for them."""
        for task in self.tasks:
            task.result()
        num_images, size, _ = self.images.shape
        return self.images.view(num_images, size, size, 3).permute(0, 3, 1, 2)

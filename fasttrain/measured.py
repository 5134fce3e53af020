"""Keeps measurements for later runs on the same machine."""

import contextlib
import hashlib
import json
from typing import Any

import fasttrain
from fasttrain import files
from fasttrain.caches import cache_dir


def key_of(*parts: Any) -> str:
    """Returns a short name for what a measurement depends on: `parts` and fasttrain's version."""
    text = json.dumps([fasttrain.__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def recall(key: str) -> Any:
    """Returns the value kept under `key`; None if there is none, or if it is damaged."""
    try:
        return json.loads((cache_dir() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def remember(key: str, value: Any) -> None:
    """Keeps a value of JSON types under `key`. If this fails, the next run measures again."""
    with contextlib.suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        files.write_bytes(cache_dir() / f"{key}.json", json.dumps(value).encode())

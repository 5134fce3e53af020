"""Digests of fasttrain's own code: whether two versions of some modules are the same."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def code_digest(package: Path = Path(__file__).parent, modules: Sequence[str] = ()) -> str:
    """Returns 12 hex digits that depend on the names and contents of modules of a package.

    Args:
        modules: their names; by default all modules, and those in sub-folders too.
    """
    digest = hashlib.sha256()
    paths = [package / f"{name}.py" for name in modules] or package.rglob("*.py")
    for path in sorted(paths):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]

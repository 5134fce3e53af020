"""The tools and the shipped recipes: where they are, and how a user calls them. Needs no torch.

In a checkout they are beside this package, in `tools/` and `recipes/`. An installed wheel has them
inside it, and installs a console command for each tool.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Console commands of the wheel, by the name of the tool's file.
TOOLS = {
    "make_shards": "fasttrain-shards",
    "verify_shards": "fasttrain-verify",
    "make_digits": "fasttrain-digits",
    "evaluate": "fasttrain-evaluate",
    "predict": "fasttrain-predict",
    "export": "fasttrain-export",
    "report": "fasttrain-report",
    "preview": "fasttrain-preview",
    "label": "fasttrain-label",
    "doctor": "fasttrain-doctor",
    "benchmark": "fasttrain-benchmark",
}


def folder(name: str) -> Path:
    """The folder `tools` or `recipes`."""
    inside = HERE / name
    return inside if inside.is_dir() else HERE.parent / name


def command(tool: str) -> str:
    """How a user calls a tool here: `python tools/evaluate.py` or `fasttrain-evaluate`."""
    in_checkout = folder("tools").parent != HERE
    return f"python tools/{tool}.py" if in_checkout else TOOLS[tool]


def recipe(path: Path) -> Path:
    """The file of a recipe. A name such as `large` means the shipped one, if there is no such file.

    Args:
        path: a path, or the name of a shipped recipe with or without `.toml`.
    """
    if not path.exists() and len(path.parts) == 1:
        shipped = folder("recipes") / f"{path.name.removesuffix('.toml')}.toml"
        if shipped.is_file():
            return shipped
    return path


def run_tool() -> None:
    """Runs the tool whose console command was called."""
    called = Path(sys.argv[0]).name
    name = {command: tool for tool, command in TOOLS.items()}[called]
    sys.path.insert(0, str(folder("tools")))  # tools import each other by plain name
    importlib.import_module(name).main()

"""Who may import whom (docs/design.md), and what starting costs."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

FOLDERS = ("lmx", "cli", "core", "quant", "convert")
# Which of our packages each folder may import; `lmx` stands for the front door, the modules in the folder of that name.
ALLOWED = {
    "core": {"core"},
    "quant": {"quant", "core"},
    "convert": {"convert", "core"},
    "lmx": {"lmx", "core", "quant", "convert"},
    "cli": {"cli", "lmx", "core"},
}
ONLY_IN_CLI = {"typer", "rich", "prompt_toolkit", "click"}
NEVER = {"transformers", "pytest"}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            # `from lmx.core import model` imports lmx.core.model
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _package(name: str) -> str | None:
    """Which of our folders an imported name lies in."""
    first, _, rest = name.partition(".")
    if first != "lmx":
        return None
    second = rest.partition(".")[0]
    return second if second in FOLDERS else "lmx"


FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_there_are_files_of_every_folder() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_rule(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in _imports(path):
        package = _package(name)
        # The text process asks the package where it lies, and the console script starts the command line.
        exempt = (folder, name) == ("core", "lmx") or (path.name, package) == ("__main__.py", "cli")
        assert exempt or package is None or package in ALLOWED[folder], f"{path} imports {name}"
        top = name.partition(".")[0]
        assert top not in NEVER, f"{path} imports {name}"
        assert folder == "cli" or top not in ONLY_IN_CLI, f"{path} imports {name}"


MEASURE = """
import resource, sys
def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before = seconds()
sum(i * i for i in range(3_000_000))
yardstick = seconds() - before
before = seconds()
try:
    {code}
except SystemExit:
    pass
print(seconds() - before, yardstick, *sorted({{name.partition('.')[0] for name in sys.modules}}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "code",
    ["import lmx", "import lmx.api", "from lmx.cli.main import app; from lmx.cli.run import run; run(app, ['--help'])"],
    ids=["import lmx", "import lmx.api", "lmx --help"],
)
def test_starting_is_cheap_and_brings_no_torch(code: str) -> None:
    """CPU time, beside that of a loop that takes some 0.2 s, since CPUs differ; the best of three runs."""
    best = 10.0
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE.format(code=code.replace("; ", "\n    "))],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
        taken, yardstick, *modules = ran.stderr.split()
        best = min(best, float(taken) / float(yardstick))
        assert not {"torch", "transformers", "tokenizers", "huggingface_hub", "rich", "prompt_toolkit"} & set(modules)
    assert best < 2.5

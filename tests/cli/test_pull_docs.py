"""docs/cli.md and `--help` of pulling and the cache tell of the same options."""

import re

import pytest
from support import ROOT, run_lmx

OPTION = re.compile(r"--[a-z][a-z-]+")
COMMON = {"--help", "--quiet", "--debug"}


def section(heading: str) -> str:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def options(*commands: str) -> set[str]:
    return {option for command in commands for option in OPTION.findall(run_lmx(command, "--help").stdout)} - COMMON


@pytest.mark.parametrize(
    ("heading", "commands"),
    [("lmx pull REPO", ("pull",)), ("lmx list, lmx rm MODEL, lmx verify MODEL", ("list", "rm", "verify"))],
)
def test_options_are_those_of_help(heading: str, commands: tuple[str, ...]) -> None:
    assert set(OPTION.findall(section(heading))) == options(*commands)

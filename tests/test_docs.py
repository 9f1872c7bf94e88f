"""What the documents name is there: files, links, scripts with their options, commands of lmx with theirs."""

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from support import ROOT
from typer.core import TyperGroup

from lmx.cli.main import app

DOCUMENTS = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))
TEXTS = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PATH = re.compile(r"^(?:benchmarks|cli|convert|core|docs|examples|lmx|quant|tests)/[a-z0-9_./*-]*$")
SCRIPT = re.compile(r"^(?:[A-Z_]+=\w+ )?python3? ((?:benchmarks|examples)/[\w/]+\.py)(.*)")
LMX = re.compile(r"^(?:.* \| |\$ )?lmx ([a-z]+)(?!\S)(.*)")
OPTION = re.compile(r"(?<![\w-])--?[a-z0-9][a-z0-9-]*")


def code(text: str) -> list[str]:
    """Every line of the fenced and indented blocks, without comments, and all that stands between backticks."""
    parts = text.split("```")
    prose, blocks = "".join(parts[::2]), "".join(parts[1::2])
    indented = re.findall(r"^    (\S.*)", prose, re.MULTILINE)
    lines = [re.sub(r"\s+#.*", "", line) for line in (*blocks.splitlines(), *indented)]
    return lines + [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]


CODE = sorted({piece for text in TEXTS for piece in code(text)})
PATHS = [piece for piece in CODE if PATH.match(piece)]
SCRIPTS = [match.groups() for piece in CODE if (match := SCRIPT.match(piece))]
COMMANDS = [match.groups() for piece in CODE if (match := LMX.match(piece))]
BENCHMARKS = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py")}


def arguments_of(script: Path) -> set[str]:
    """What its `add_argument` calls name."""
    calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {str(word.value) for call in added for word in call.args if isinstance(word, ast.Constant)}


def test_there_is_something_to_check() -> None:
    assert min(len(PATHS), len(SCRIPTS)) > 10
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path: str) -> None:
    assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize(("script", "words"), SCRIPTS)
def test_scripts_have_the_options(script: str, words: str) -> None:
    assert set(OPTION.findall(words)) <= arguments_of(ROOT / script)


@pytest.mark.parametrize("script", sorted(BENCHMARKS | {script for script, _ in SCRIPTS}))
def test_scripts_say_how_to_use_them(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_lmx_has_the_options(name: str, words: str) -> None:
    group: Any = typer.main.get_command(app)
    commands = [group.commands[name]]
    if isinstance(commands[0], TyperGroup) and words:
        commands = [commands[0].commands[each] for each in words.split()[0].split("|")]
    parameters = [parameter for command in commands for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(OPTION.findall(words)) - {"--help"} <= known

"""Every lmx command of the README runs as written; `MODEL` and hub ids stand for a checkpoint that is here."""

import re
import shlex
from pathlib import Path

import pytest
from readme import README, command, commands
from small_checkpoint import write_checkpoint
from support import run_lmx

HUB_ID = re.compile(r"\b(?:mistralai|allenai|tiiuae|google|databricks)/[\w.-]+")
LMX = [line for line in commands() if line.startswith("lmx ")]


def test_there_are_the_two_commands() -> None:
    assert command("install").startswith("pip install . && lmx chat")
    assert command("test") == "pip install -e '.[dev]' && pytest"


def test_there_are_commands_to_run() -> None:
    assert len(LMX) >= 4


@pytest.mark.parametrize("line", LMX)
def test_commands_run(line: str, tmp_path: Path) -> None:
    demo = str(README.parent / "lmx" / "demo")
    line = HUB_ID.sub(demo, line)
    words = shlex.split(line.split("|")[-1])[1:]
    short = ("-n", "8") if words[0] in ("chat", "generate") else ()
    done = run_lmx(*words, *short, stdin="What is NF4?", cwd=tmp_path, env={"LMX_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        code, replaced = HUB_ID.subn(str(folder), block)
        assert replaced
        names: dict[str, object] = {}
        exec(code, names)
        names["model"].close()  # type: ignore[attr-defined]
    assert "tensor(" in capsys.readouterr().out

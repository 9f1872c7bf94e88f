"""Every lmx command of the README runs as written; `MODEL` and hub ids stand for a checkpoint that is here,
or, to be pulled, on a hub that is here."""

import re
import shlex
from pathlib import Path

import pytest
from hub_server import environment, serving
from readme import README, command, commands
from small_checkpoint import write_checkpoint
from support import run_lmx

HUB_ID = re.compile(r"\b(?:mistralai|allenai|tiiuae|google|databricks)/[\w.-]+")
LMX = [line for line in commands() if line.startswith("lmx ")]


def test_there_are_the_two_commands() -> None:
    assert command("install").startswith("pip install . && lmx chat")
    assert command("test") == "pip install -e '.[dev]' && pytest -n 2 --dist worksteal"


def test_there_are_commands_to_run() -> None:
    assert len(LMX) >= 4


@pytest.mark.parametrize("line", LMX)
def test_commands_run(line: str, tmp_path: Path) -> None:
    demo = README.parent / "lmx" / "demo"
    is_pull = line.startswith("lmx pull ")
    line = HUB_ID.sub("org/tiny" if is_pull else str(demo), line)
    words = shlex.split(line.split("|")[-1])[1:]
    short = ("-n", "8") if words[0] in ("chat", "generate") else ()
    with serving({path.name: path.read_bytes() for path in demo.iterdir()} if is_pull else {}) as hub:
        env = environment(hub, tmp_path / "cache") | {"LMX_HOME": str(tmp_path / "home")}
        done = run_lmx(*words, *short, stdin="What is NF4?", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (done.stderr if words[0] == "convert" else done.stdout).strip()
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

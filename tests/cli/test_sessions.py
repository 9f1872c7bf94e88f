"""`--session` for scripts, and `lmx sessions`."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.core.saved_session import SavedSession
from lmx.core.session_record import read_record


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ask(lmx: Any, *args: object, code: int = 0) -> list[dict[str, Any]]:
    """The demo model, greedy."""
    ran = lmx("chat", *args, "--json", "--temperature", 0)
    assert ran.code == code, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def test_a_session_goes_on_in_the_next_run_without_reading_again(lmx: Any, home: Path) -> None:
    together = ask(lmx, "-p", "Hello", "-p", "What is NF4?", "-p", "Thank you")
    (first,) = ask(lmx, "--session", "a", "-p", "Hello")
    second, third = ask(lmx, "--session", "a", "-p", "What is NF4?", "-p", "Thank you")
    same = ("text", "prompt_ids", "token_ids", "logprobs", "computed_prompt_tokens")
    for alone, answer in zip((first, second, third), together, strict=True):
        assert {key: alone[key] for key in same} == {key: answer[key] for key in same}
    assert second["computed_prompt_tokens"] < second["prompt_tokens"]


def test_the_systems_message_is_the_sessions_unless_another_is_given(lmx: Any, home: Path) -> None:
    ask(lmx, "--session", "a", "-p", "Hello", "--system", "Be brief")
    (kept,) = ask(lmx, "--session", "a", "-p", "Hello", "-n", 0)
    messages = [{"role": "system", "content": "Be brief"}]
    assert read_record(home / "sessions" / "a" / "session.jsonl").conversation.head.system == "Be brief"  # type: ignore[union-attr]
    (other,) = ask(lmx, "--session", "a", "-p", "Hello", "-n", 0, "--system", "Be long")
    assert kept["computed_prompt_tokens"] == 0 == other["computed_prompt_tokens"]
    assert kept["prompt_ids"][:8] == lmx_prompt(lmx, messages)[:8] != other["prompt_ids"][:8]


def lmx_prompt(lmx: Any, messages: list[dict[str, str]]) -> list[int]:
    given = json.dumps([*messages, {"role": "user", "content": "Hello"}])
    ids: list[int] = json.loads(lmx("chat", "--messages", "-", "-n", 0, "--json", stdin=given).out)["prompt_ids"]
    return ids


def test_another_model_is_refused_unless_it_may_read_again(lmx: Any, home: Path, checkpoint: Path) -> None:
    ask(lmx, "--session", "a", "-p", "Hello")
    ran = lmx("chat", checkpoint, "--session", "a", "-p", "x", "-n", 3)
    assert (ran.code, ran.out) == (3, "")
    assert "not demo" in ran.err.splitlines()[0]
    assert "--reread" in ran.err.splitlines()[1]
    refused = lmx("chat", "--session", "a", "-p", "x", "-n", 3, "--dtype", "fp32")
    assert refused.code == 3
    assert "fp32 weights, not bf16" in refused.err
    ran = lmx("chat", checkpoint, "--session", "a", "-p", "x", "-n", 3, "--json", "--reread")
    answer = json.loads(ran.out)
    assert answer["computed_prompt_tokens"] == answer["prompt_tokens"]
    assert lmx("chat", checkpoint, "--session", "a", "-p", "x", "-n", 3).code == 0


def test_one_process_has_a_session(lmx: Any, home: Path) -> None:
    ask(lmx, "--session", "a", "-p", "Hello")
    identity = read_record(home / "sessions" / "a" / "session.jsonl").identity
    held = SavedSession.open(home / "sessions", "a", identity)
    for args in (("chat", "--session", "a", "-p", "x"), ("sessions", "rm", "a")):
        ran = lmx(*args)
        assert ran.code == 7
        assert "another process" in ran.err
    assert lmx("sessions", "show", "a").code == 0
    held.close()
    assert lmx("sessions", "rm", "a").code == 0


def test_a_session_of_a_script_that_failed_leaves_nothing(lmx: Any, home: Path) -> None:
    assert lmx("chat", "--session", "a", "-p", "long " * 3000).code == 3
    assert lmx("sessions", "list", "--json").out == ""


def test_list_show_export_and_rm(lmx: Any, home: Path, tmp_path: Path) -> None:
    assert lmx("sessions", "list").out == ""
    said = ask(lmx, "--session", "a", "-p", "Hello", "-p", "What is NF4?", "--system", "Be brief")
    ask(lmx, "--session", "b", "-p", "Hi \x1b]52;c;ZXZpbA==\x07")
    ran = lmx("sessions", "list")
    assert [line.split("\t")[0] for line in ran.out.splitlines()] == ["b", "a"]
    assert "\x1b" not in ran.out
    assert "2 turns · demo (bf16)" in ran.out
    b, a = (json.loads(line) for line in lmx("sessions", "list", "--json").out.splitlines())
    assert (a["name"], a["turns"], a["branches"], a["model"], b["turns"]) == ("a", 2, 1, "demo", 1)
    assert a["tokens"] == len(said[-1]["prompt_ids"]) + len(said[-1]["token_ids"])

    expected = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": said[0]["text"]},
        {"role": "user", "content": "What is NF4?"},
        {"role": "assistant", "content": said[1]["text"]},
    ]
    assert json.loads(lmx("sessions", "show", "a", "--json").out)["messages"] == expected
    assert json.loads(lmx("sessions", "export", "a", "--format", "json").out) == expected
    shown = lmx("sessions", "show", "a").out
    assert shown == lmx("sessions", "export", "a").out
    assert shown.startswith("# a\n\nModel: demo (bf16)\n\n## System\n\nBe brief\n\n## User\n\nHello\n")
    assert "\x1b" not in lmx("sessions", "show", "b").out

    file = tmp_path / "b.md"
    assert lmx("sessions", "export", "b", "-o", file).code == 0
    assert "Hi \x1b]52" in file.read_text()
    again = lmx("sessions", "export", "b", "-o", file)
    assert (again.code, "--force" in again.err) == (7, True)
    as_json = tmp_path / "a.json"
    assert lmx("sessions", "export", "a", "-o", as_json, "-q").err == ""
    as_json.write_text(json.dumps(json.loads(as_json.read_text())[:-1]))
    replayed = lmx("chat", "--messages", as_json, "--json", "--temperature", 0)
    assert json.loads(replayed.out)["token_ids"] == said[1]["token_ids"]

    assert lmx("sessions", "rm", "a", "b").code == 0
    for command in ("show", "rm", "export"):
        ran = lmx("sessions", command, "a")
        assert ran.code == 4
        assert "there is no session 'a'" in ran.err
        assert lmx("sessions", command, "../a").code == 2


def test_a_damaged_session_is_listed_and_can_be_removed(lmx: Any, home: Path) -> None:
    ask(lmx, "--session", "a", "-p", "Hello")
    (home / "sessions" / "a" / "session.jsonl").write_text("{}\n")
    ran = lmx("sessions", "list")
    assert (ran.code, "cannot be read" in ran.out) == (0, True)
    assert json.loads(lmx("sessions", "list", "--json").out)["error"]
    assert lmx("sessions", "show", "a").code == 3
    assert lmx("chat", "--session", "a", "-p", "x").code == 3
    assert lmx("sessions", "rm", "a").code == 0


def test_the_folder_follows_the_xdg_specification(lmx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMX_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    ask(lmx, "--session", "a", "-p", "Hello")
    folder = tmp_path / "data" / "lmx" / "sessions" / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "session.jsonl", "turn-0.safetensors"]
    assert folder.stat().st_mode & 0o077 == 0

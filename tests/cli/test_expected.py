"""The trained Mixtral checkpoint of ../shared says, token for token, what transformers says."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from support import SHARED, needs_shared

pytestmark = needs_shared
FOLDER = SHARED / "checkpoints" / "mixtral"
FLOAT32 = ("--temperature", "0", "--dtype", "fp32")


@pytest.fixture(scope="module")
def conversations() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())["conversations"]
    return found


@pytest.fixture(scope="module")
def chains(conversations: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Conversations of one turn, each followed by those that continue it; the system's words aside."""
    chains: list[list[dict[str, Any]]] = []
    for conversation in conversations:
        turns = len([m for m in conversation["messages"] if m["role"] == "user"])
        if turns == 1:
            chains.append([])
        chains[-1].append(conversation)
    return chains


def _user_texts(chain: list[dict[str, Any]]) -> list[str]:
    return [conversation["messages"][-1]["content"] for conversation in chain]


def _system(chain: list[dict[str, Any]]) -> tuple[str, ...]:
    first = chain[0]["messages"][0]
    return ("--system", first["content"]) if first["role"] == "system" else ()


def test_generate_gives_the_greedy_ids(lmx: Any, conversations: list[dict[str, Any]]) -> None:
    assert len(conversations) > 3
    for expected in conversations:
        ids = ",".join(map(str, expected["prompt_ids"]))
        ran = lmx("generate", FOLDER, "--prompt-ids", ids, *FLOAT32, "-n", 48, "--json")
        answer = json.loads(ran.out)
        assert answer["token_ids"] == expected["greedy_ids"]
        assert answer["prompt_ids"] == expected["prompt_ids"]


def test_chat_gives_the_replies_turn_by_turn(lmx: Any, chains: list[list[dict[str, Any]]]) -> None:
    assert max(map(len, chains)) > 1
    for chain in chains:
        prompts = [arg for text in _user_texts(chain) for arg in ("-p", text)]
        answers = [
            json.loads(line)
            for line in lmx("chat", FOLDER, *prompts, *_system(chain), *FLOAT32, "--json").out.splitlines()
        ]
        assert [answer["text"] for answer in answers] == [expected["reply"] for expected in chain]
        assert [answer["prompt_ids"] for answer in answers] == [expected["prompt_ids"] for expected in chain]
        assert [answer["token_ids"] for answer in answers] == [expected["greedy_ids"] for expected in chain]


def test_chat_answers_whole_conversations(lmx: Any, conversations: list[dict[str, Any]]) -> None:
    for expected in conversations[-3:]:
        ran = lmx("chat", FOLDER, "--messages", "-", *FLOAT32, "--json", stdin=json.dumps(expected["messages"]))
        assert json.loads(ran.out)["text"] == expected["reply"]


def test_messages_typed_one_after_another_get_the_replies(chains: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    chain = max(chains, key=len)
    child = pexpect.spawn(
        sys.executable,
        ["-m", "lmx", "chat", str(FOLDER), *FLOAT32, *_system(chain), "--plain"],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 200),
    )
    try:
        child.expect_exact("> ")
        for text, expected in zip(_user_texts(chain), chain, strict=True):
            child.sendline(text)
            child.expect(r"\[(\d+) tokens, .*?\]\r\n")
            lines = [line for line in (child.before or "").splitlines() if line]
            assert lines[-1] == expected["reply"], lines
            new = re.search(r"(\d+) of (\d+) prompt tokens", child.match.group(0))
            assert new is not None
            assert int(new[2]) == len(expected["prompt_ids"])
            child.expect_exact("> ")
        child.sendeof()
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0

"""Conversations kept on a disk, and gone back in: what is computed again, and that the answers are the same bits."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from saved_sessions import FAMILIES, IDENTITY, WORDS, Box, bits, fresh, last, new_tokens, say, session_with
from support import needs_shared

from lmx.core.conversation import Conversation
from lmx.core.errors import ConflictError, InputError, NotFoundError, UsageError
from lmx.core.saved_session import OtherModelError, SavedSession
from lmx.core.session import ChatSession
from lmx.core.session_folders import list_sessions, read_session, remove_session

pytestmark = needs_shared


@pytest.fixture(scope="module", params=FAMILIES)
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    made = Box(request.param)
    yield made
    made.engine.close()


def test_undo_regen_edit_and_fork_compute_only_what_is_new(box: Box) -> None:
    session = box.chat()
    held = [0]
    for words in WORDS[:3]:
        say(session, words)
        held.append(session.turns[-1].held)
    first = session.turns[-1]

    again = last(session.regenerate())
    assert again.computed_prompt_tokens == 1
    assert again.token_ids == first.ids[first.prompt_length - first.start :]
    assert len(session.branches) == 2

    edited = last(session.edit("Who am I?"))
    assert edited.computed_prompt_tokens <= new_tokens(session, held[2])
    assert edited.token_ids == fresh(box, session).token_ids

    session.switch(0)  # back to the first answer: its own part was kept when the state was cut
    after = say(session, "And now?")
    assert after.computed_prompt_tokens <= new_tokens(session, held[3])
    assert after.token_ids == fresh(box, session).token_ids

    session.undo(2)
    assert [message.content for message in session.messages[::2]] == list(WORDS[:2])
    other = say(session, WORDS[3])
    assert other.computed_prompt_tokens <= new_tokens(session, held[2])
    assert other.token_ids == fresh(box, session).token_ids

    session.fork(1)
    other = say(session, WORDS[4])
    assert other.computed_prompt_tokens <= new_tokens(session, held[1])
    assert other.token_ids == fresh(box, session).token_ids


@pytest.mark.parametrize("most", [24, 3], ids=["whole answers", "cut off"])
def test_a_resumed_session_goes_on_to_the_same_bits(box: Box, most: int, tmp_path: Path) -> None:
    through, saved = box.chat(max_new_tokens=most), box.chat(max_new_tokens=most)
    saved.save_to(SavedSession.create(tmp_path, "a", IDENTITY))
    for words in WORDS[:3]:
        assert say(through, words).token_ids == say(saved, words).token_ids
    saved.detach()
    resumed = box.chat(max_new_tokens=most)
    resumed.resume(SavedSession.open(tmp_path, "a", IDENTITY))
    assert (resumed.messages, resumed.ids) == (through.messages, through.ids)
    for words in WORDS[3:]:
        kept = through._keeper.live.length  # type: ignore[union-attr]
        expected, continued = say(through, words), say(resumed, words)
        assert (continued.token_ids, continued.logprobs) == (expected.token_ids, expected.logprobs)
        assert continued.computed_prompt_tokens == new_tokens(resumed, kept)
    assert bits(resumed) == bits(through)
    assert say(resumed, "Bye").token_ids == fresh(box, resumed, most).token_ids
    resumed.undo(3)
    assert len(list((tmp_path / "a").glob("turn-*"))) == len(resumed.turns) == 3
    kept = resumed.turns[-1].held
    assert say(resumed, "Hello?").computed_prompt_tokens <= new_tokens(resumed, kept)
    resumed.detach()


def test_saving_a_conversation_later_keeps_all_of_it(box: Box, tmp_path: Path) -> None:
    session = box.chat()
    for words in WORDS[:2]:
        say(session, words)
    last(session.regenerate())
    session.save_to(SavedSession.create(tmp_path, "a", IDENTITY))
    session.detach()
    for branch in (1, 0):
        resumed = box.chat()
        resumed.resume(SavedSession.open(tmp_path, "a", IDENTITY))
        assert (len(resumed.branches), resumed.branch) == (2, 1)
        resumed.switch(branch)
        kept = resumed.turns[-1].held
        assert say(resumed, WORDS[2]).computed_prompt_tokens == new_tokens(resumed, kept)
        last_bits = bits(resumed)
        resumed.undo()
        resumed.switch(1)
        resumed.detach()
    assert last_bits == bits(session_with(box, WORDS[:3]))


def test_past_the_bound_older_states_come_from_the_disk_or_are_read_again(box: Box, tmp_path: Path) -> None:
    for saved in (True, False):
        session = box.chat(snapshot_bytes=0)
        if saved:
            session.save_to(SavedSession.create(tmp_path, "a", IDENTITY))
        for words in WORDS[:3]:
            say(session, words)
        assert session.snapshot_bytes == 0
        session.undo(2)
        kept = session.turns[-1].held
        finished = say(session, "Hello?")
        rewinds = session._keeper.live.rewinds  # type: ignore[union-attr]
        if rewinds:  # the new question may begin as the old one
            assert finished.computed_prompt_tokens <= new_tokens(session, kept)
        else:
            assert finished.computed_prompt_tokens == new_tokens(session, kept if saved else 0)
        assert finished.token_ids == fresh(box, session).token_ids
        session.detach()


def test_whole_states_past_their_bound_are_removed_from_the_disk(box: Box, tmp_path: Path) -> None:
    session = box.chat()
    session.save_to(SavedSession.create(tmp_path, "a", IDENTITY, state_bytes=1))
    for words in WORDS[:3]:
        say(session, words)
    left = sorted(path.name for path in (tmp_path / "a").glob("turn-*"))
    rewinds = session._keeper.live.rewinds  # type: ignore[union-attr]
    assert left == (["turn-0.safetensors", "turn-1.safetensors", "turn-2.safetensors"] if rewinds else left[-1:])
    assert left[-1] == "turn-2.safetensors"
    session.detach()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Box, ChatSession]]:
    box = Box("mixtral")
    session = box.chat()
    session.save_to(SavedSession.create(tmp_path, "a", IDENTITY))
    say(session, WORDS[0])
    say(session, WORDS[1])
    session.detach()
    yield box, session
    box.engine.close()


def test_a_record_torn_anywhere_in_its_last_line_loses_that_line_alone(
    small: tuple[Box, ChatSession], tmp_path: Path
) -> None:
    _box, _session = small
    record = tmp_path / "a" / "session.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1]) - len(lines[-2])  # the second turn and where the branch then ends
    for cut in [*range(start, len(whole), max(1, (len(whole) - start) // 12)), len(whole) - 1]:
        record.write_bytes(whole[:cut])
        saved = SavedSession.open(tmp_path, "a", IDENTITY)
        assert len(saved.conversation.head.path()) == 1  # type: ignore[union-attr]
        saved.close()
        assert record.read_bytes().endswith(b"\n"), "tidied up: what is appended begins a line of its own"
        assert read_session(tmp_path, "a").record.whole  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "a")


def test_damaged_states_are_not_used(small: tuple[Box, ChatSession], tmp_path: Path) -> None:
    box, session = small
    for damage in (b"", b"x" * 100, (tmp_path / "a" / "turn-0.safetensors").read_bytes()):
        (tmp_path / "a" / "turn-1.safetensors").write_bytes(damage)
        resumed = box.chat()
        resumed.resume(SavedSession.open(tmp_path, "a", IDENTITY))
        finished = say(resumed, WORDS[2])
        assert finished.computed_prompt_tokens == new_tokens(resumed, session.turns[0].held)
        assert finished.token_ids == fresh(box, resumed).token_ids
        resumed.undo()
        resumed.detach()


def test_another_model_is_refused_and_may_read_the_messages_again(
    small: tuple[Box, ChatSession], tmp_path: Path
) -> None:
    box, session = small
    for change, said in (
        ({"revision": "r2"}, "another revision"),
        ({"revision": "r2", "model": "other"}, "the model other"),
        ({"scheme": "nf4"}, "nf4"),
        ({"template": "t2"}, "template"),
    ):
        with pytest.raises(OtherModelError, match=said):
            SavedSession.open(tmp_path, "a", replace(IDENTITY, **change))
    SavedSession.open(tmp_path, "a", replace(IDENTITY, model="moved")).close()
    other = replace(IDENTITY, scheme="nf4")
    resumed = box.chat()
    resumed.resume(SavedSession.open(tmp_path, "a", other, reread=True))
    assert resumed.messages == session.messages
    finished = say(resumed, WORDS[2])
    assert finished.computed_prompt_tokens == finished.prompt_tokens
    resumed.detach()
    SavedSession.open(tmp_path, "a", other).close()


def test_one_writer_at_a_time(small: tuple[Box, ChatSession], tmp_path: Path) -> None:
    _box, _ = small
    held = SavedSession.open(tmp_path, "a", IDENTITY)
    with pytest.raises(ConflictError):
        SavedSession.open(tmp_path, "a", IDENTITY)
    with pytest.raises(ConflictError):
        remove_session(tmp_path, "a")
    held.close()
    with pytest.raises(ConflictError, match="already"):
        SavedSession.create(tmp_path, "a", IDENTITY)
    remove_session(tmp_path, "a")
    with pytest.raises(NotFoundError):
        SavedSession.open(tmp_path, "a", IDENTITY)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/etc", ".hidden", "a\x00b", "a\nb", "x" * 101, "a:b"])
def test_names_stay_within_the_folder(name: str, tmp_path: Path) -> None:
    for use in (SavedSession.create, lambda *a: read_session(a[0], a[1]), lambda *a: remove_session(a[0], a[1])):
        with pytest.raises(UsageError):
            use(tmp_path / "sessions", name, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_a_link_is_no_session(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        SavedSession.create(tmp_path / "sessions", "a", IDENTITY)


def test_a_session_in_which_nothing_was_said_leaves_nothing(tmp_path: Path) -> None:
    saved = SavedSession.create(tmp_path, "a", IDENTITY)
    saved.begin(Conversation(), lambda turn: None)
    assert len(list_sessions(tmp_path)) == 1
    saved.close()
    assert list_sessions(tmp_path) == []


BAD_LINES = [
    b"nonsense",
    b"[]",
    b'{"what": 1}',
    b'{"turn": 0}',
    b'{"branches": [5], "current": 0}',
    b'{"branches": [null], "current": 1}',
    b'{"question": [{"role": "user"}]}',
    b'{"turn": 9, "parent": 77, "messages": [], "ids": [], "text": "", "left_out": 0, "start": 0, "prompt_length": 0,'
    b' "held": 0, "text_start": 0}',
    b'{"turn": 9, "parent": null, "messages": [{"role": "user", "content": "x"}], "ids": [1], "text": "",'
    b' "left_out": 0, "start": 5, "prompt_length": 5, "held": 0, "text_start": 0}',
    b'{"turn": 9, "parent": null, "messages": [{"role": "user", "content": "x"}], "ids": [-1], "text": "",'
    b' "left_out": 0, "start": 0, "prompt_length": 0, "held": 0, "text_start": 0}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_damaged_record_is_told(line: bytes, small: tuple[Box, ChatSession], tmp_path: Path) -> None:
    _box, _ = small
    record = tmp_path / "a" / "session.jsonl"
    record.write_bytes(record.read_bytes() + line + b"\n")
    with pytest.raises(InputError):
        SavedSession.open(tmp_path, "a", IDENTITY)
    (info,) = list_sessions(tmp_path)
    assert info.problem
    remove_session(tmp_path, "a")


def test_a_disk_that_fails_ends_the_saving_and_not_the_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box("mixtral")
    with box.engine:
        session = box.chat()
        session.save_to(SavedSession.create(tmp_path, "a", IDENTITY))
        say(session, WORDS[0])

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            say(session, WORDS[1])
        assert session.saved is None
        assert session.save_error is not None
        assert "no space" in session.save_error.message
        assert len(session.turns) == 2

"""Where what was typed is kept, and that a chat goes on where it cannot be."""

import errno
import os
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory

from lmx.cli.lines import _history, state_folder


def test_the_state_folder_is_that_of_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "lmx"
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/ada")
    for relative in ("", "state"):  # a relative path there must be ignored
        monkeypatch.setenv("XDG_STATE_HOME", relative)
        assert state_folder() == Path("/home/ada/.local/state/lmx")


def test_without_a_home_what_is_typed_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert isinstance(_history(), InMemoryHistory)


def test_a_place_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lmx").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(_history(), InMemoryHistory)


def test_a_disk_that_fills_up_later_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = _history()
    assert isinstance(history, FileHistory)
    history.append_string("kept")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileHistory, "store_string", full)
    history.append_string("lost")
    assert history.get_strings() == ["kept", "lost"]
    assert "+kept" in (tmp_path / "lmx" / "chat-history").read_text()

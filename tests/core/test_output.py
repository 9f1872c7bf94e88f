"""The output folder: nothing under its name before the end, one process at a time, and a journal to go on from."""

import json

import pytest
import torch

from lmx.core.errors import ConflictError, ResourceError, UsageError
from lmx.core.output import open_output
from lmx.core.shards import Slot, plan_shards

SHARDS = plan_shards([[(Slot(name, "U8", (8,)),)] for name in "abc"], 8)


def write_shard(output, number, value=1):
    with output.shard(SHARDS[number], {"value": value}) as file:
        file.write("abc"[number], torch.full((8,), value, dtype=torch.uint8))


def write_all(target, job="job", **options):
    with open_output(target, job, **options) as output:
        for number, shard in enumerate(SHARDS):
            if shard.name not in output.finished:
                write_shard(output, number)
        output.add("config.json", b"{}")
        output.commit()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def old_output(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "mine").write_text("x")


def test_the_folder_appears_whole_and_alone(tmp_path):
    with open_output(tmp_path / "deep" / "model", "job") as output:
        write_shard(output, 0)
        assert names(tmp_path / "deep") == ["model.partial"]
        output.commit()
    assert names(tmp_path / "deep") == ["model"]
    assert names(tmp_path / "deep" / "model") == [SHARDS[0].name]


def test_an_existing_folder_is_refused_and_stays(tmp_path):
    old_output(tmp_path / "model")
    with pytest.raises(ConflictError, match="exists already"):
        write_all(tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json", "mine"]


def test_force_replaces_at_the_end_alone(tmp_path):
    old_output(tmp_path / "model")
    with open_output(tmp_path / "model", "job", force=True) as output:
        write_shard(output, 0)
        assert names(tmp_path / "model") == ["config.json", "mine"]
    write_all(tmp_path / "model", force=True)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json", *(shard.name for shard in SHARDS)]


def test_force_replaces_no_folder_that_is_something_else(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("model", "file"):
        with pytest.raises(ConflictError, match="no checkpoint folder"):
            write_all(tmp_path / name, force=True)
    assert names(tmp_path) == ["file", "model"]
    assert names(tmp_path / "model") == ["thesis.txt"]


def test_a_second_worker_is_turned_away_and_the_first_goes_on(tmp_path):
    with open_output(tmp_path / "model", "job") as output:
        with pytest.raises(ConflictError, match="another process"):
            write_all(tmp_path / "model")
        write_shard(output, 0)
        output.commit()
    assert names(tmp_path) == ["model"]


def test_a_stopped_job_goes_on_behind_its_last_complete_shard(tmp_path):
    with open_output(tmp_path / "model", "job") as output:
        write_shard(output, 0, value=7)
        with pytest.raises(KeyboardInterrupt), output.shard(SHARDS[1], {}):
            raise KeyboardInterrupt
    with open_output(tmp_path / "model", "job") as output:
        assert output.finished == {SHARDS[0].name: {"value": 7}}
        assert names(tmp_path / "model.partial" / "out") == [SHARDS[0].name]


def test_another_job_begins_anew(tmp_path):
    with open_output(tmp_path / "model", "job") as output:
        write_shard(output, 0)
    with open_output(tmp_path / "model", "other") as output:
        assert output.finished == {}
        assert names(tmp_path / "model.partial" / "out") == []


@pytest.mark.parametrize("tail", ['{"shard": "mod', "\x00\x00\x00", "[]\n", "nonsense\n"])
def test_a_torn_journal_is_believed_up_to_the_tear(tmp_path, tail):
    with open_output(tmp_path / "model", "job") as output:
        write_shard(output, 0)
    with (tmp_path / "model.partial" / "journal.jsonl").open("a") as file:
        file.write(tail)
    with open_output(tmp_path / "model", "job") as output:
        assert set(output.finished) == {SHARDS[0].name}
        write_shard(output, 1)
    with open_output(tmp_path / "model", "job") as output:
        assert set(output.finished) == {SHARDS[0].name, SHARDS[1].name}


def test_a_shard_of_the_wrong_size_is_made_again(tmp_path):
    with open_output(tmp_path / "model", "job") as output:
        write_shard(output, 0)
    with (tmp_path / "model.partial" / "out" / SHARDS[0].name).open("a") as file:
        file.write("x")
    with open_output(tmp_path / "model", "job") as output:
        assert output.finished == {}


def test_a_run_killed_between_the_last_two_renames_gives_the_old_output_back(tmp_path):
    old_output(tmp_path / "model")
    with open_output(tmp_path / "model", "job", force=True) as output:
        write_shard(output, 0)
    (tmp_path / "model").rename(tmp_path / "model.partial" / "old")
    with pytest.raises(ConflictError, match="exists already"), open_output(tmp_path / "model", "job"):
        pass
    assert names(tmp_path / "model") == ["config.json", "mine"]
    write_all(tmp_path / "model", force=True)
    assert names(tmp_path) == ["model"]


def test_the_shell_of_a_run_killed_after_its_last_rename_is_swept_up(tmp_path):
    write_all(tmp_path / "model")
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "journal.jsonl").write_text(json.dumps({"job": "job"}) + "\n")
    with pytest.raises(ConflictError, match="exists already"):
        write_all(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_half_a_journal_of_a_killed_run_is_swept_up(tmp_path):
    with open_output(tmp_path / "model", "job") as output:
        write_shard(output, 0)
    (tmp_path / "model.partial" / ".journal.jsonl.4711.partial").write_text('{"job"')
    write_all(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_a_folder_in_a_file_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_all(tmp_path / "file" / "model")


def test_the_root_is_no_output():
    with pytest.raises(UsageError, match="cannot be an output folder"):
        write_all("/")


def test_what_a_stopped_run_has_written_needs_no_room_again(tmp_path, monkeypatch):
    whole = plan_shards([[(Slot(name, "U8", (1000,)),)] for name in "ab"])
    with open_output(tmp_path / "model", "job") as output, output.shard(whole[0], {}) as file:
        file.write("a", torch.ones(1000, dtype=torch.uint8))
        output.keep(file, 1)
        file.write("b", torch.ones(1000, dtype=torch.uint8))
    (tmp_path / "model.partial" / "journal.jsonl").write_text(
        "".join(
            line
            for line in (tmp_path / "model.partial" / "journal.jsonl").read_text().splitlines(keepends=True)
            if '"shard"' not in line
        )
    )
    with open_output(tmp_path / "model", "job") as output:
        monkeypatch.setattr(type(output), "free_bytes", lambda self: whole[0].size - 1000)
        output.check_room(whole)
        monkeypatch.setattr(type(output), "free_bytes", lambda self: whole[0].size - 1001)
        with pytest.raises(ResourceError, match="GB more"):
            output.check_room(whole)

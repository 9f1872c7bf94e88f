"""Quantizing under kills, full disks, rivals and damaged sources: all of it or nothing, and then the same bytes."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
import quantize_child
from families import config_of, write_family, write_tensors
from fork_server import start_server
from safetensors.torch import load_file

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, ResourceError
from lmx.core.output import OutputFolder
from lmx.quant.quantize import quantize
from lmx.quant.report import Finished, Progress

KILLS = 30
OLD = {"config.json": b"old"}


@pytest.fixture(scope="module")
def server():
    return start_server("quantize_child")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("source") / "model", "mixtral")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The bytes of an undisturbed run."""
    target = tmp_path_factory.mktemp("expected") / "out"
    finish(source, target)
    return contents(target)


def finish(source, target, force=False):
    """Run to the end in this process; returns how many parameters an earlier run had written."""
    events = list(quantize(Checkpoint.open(source), target, quantize_child.SPEC, quantize_child.options(force)))
    assert isinstance(events[-1], Finished)
    return next((event.resumed for event in events if isinstance(event, Progress)), 0)


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(server, *args):
    child = server.Process(target=quantize_child.run, args=args)
    child.start()
    return child


def journalled(partial: Path):
    """The shards that the journal calls complete."""
    path = partial / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["shard"] for line in lines[1:] if line.endswith("\n")]


def test_killed_at_any_moment_it_leaves_nothing_or_all_and_goes_on(server, source, expected, tmp_path):
    child = start(server, source, tmp_path / "measure")
    begin = time.perf_counter()
    child.join()
    duration, draw = time.perf_counter() - begin, random.Random(4)
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 8
    resumed = killed = 0
    for number in range(KILLS):
        target = tmp_path / str(number)
        child = start(server, source, target)
        child.join(draw.uniform(0, 1.2 * duration))
        child.kill()
        child.join()
        if target.exists():
            assert contents(target) == expected
            duration *= 0.8  # the machine was busier when it was measured: kill sooner
            continue
        killed += 1
        partial = tmp_path / f"{number}.partial"
        done = journalled(partial)
        for name in done:  # what the journal calls complete is
            assert (partial / "out" / name).read_bytes() == expected[name]
        assert finish_and_count(source, target) == len(expected_shards(expected)) - len(done)
        assert contents(target) == expected
        assert not partial.exists()
        resumed += bool(done)
    assert killed >= 5
    assert resumed >= 2


def expected_shards(expected):
    return [name for name in expected if name.endswith(".safetensors")]


def finish_and_count(source, target):
    """Run to the end in this process; returns how many shards it wrote."""
    written = []
    original = OutputFolder.shard

    def counted(self, shard, notes):
        written.append(shard.name)
        return original(self, shard, notes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "shard", counted)
        finish(source, target)
    return len(written)


def test_killed_while_it_replaces_an_output_the_old_one_or_the_new_one_is_there(server, source, expected, tmp_path):
    target, draw = tmp_path / "out", random.Random(5)
    for _ in range(6):
        if not target.exists():
            target.mkdir()
            (target / "config.json").write_text("old")
        child = start(server, source, target, True)
        child.join(draw.uniform(0, 0.3))
        child.kill()
        child.join()
        assert not target.exists() or contents(target) == OLD or contents(target) == expected
    finish(source, target, force=True)
    assert contents(target) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_processes_one_works_and_the_other_exits_7(server, source, expected, tmp_path):
    children = [start(server, source, tmp_path / "out") for _ in range(2)]
    for child in children:
        child.join()
    assert sorted(child.exitcode for child in children) == [0, 7]
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_changed_is_not_mixed_with_what_was_made_of_the_old(source, expected, tmp_path):
    half = quantize(Checkpoint.open(source), tmp_path / "out", quantize_child.SPEC, quantize_child.options())
    for _ in range(20):
        next(half)
    half.close()
    assert journalled(tmp_path / "out.partial")
    other = write_family(tmp_path / "other", "mixtral", seed=1)
    assert finish(other, tmp_path / "out") == 0
    finish(other, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") != expected


def old_output(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def test_a_limit_on_file_sizes_exits_6_and_the_old_output_stays(server, source, expected, tmp_path):
    target = old_output(tmp_path / "out")
    child = start(server, source, target, True, 4000)
    child.join()
    assert child.exitcode == 6
    assert contents(target) == OLD
    finish(source, target, force=True)
    assert contents(target) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where we may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_seen_before_anything_is_written(source, small_disk):
    with pytest.raises(ResourceError, match="GB more"):
        finish(source, small_disk / "out")


def test_a_disk_that_fills_up_is_a_resource_error_and_the_old_output_stays(source, small_disk, monkeypatch):
    monkeypatch.setattr(OutputFolder, "free_bytes", lambda self: 1 << 40)
    target = old_output(small_disk / "out")
    with pytest.raises(ResourceError, match="no space left"):
        finish(source, target, force=True)
    assert contents(target) == OLD


def test_a_read_only_disk_is_a_resource_error(source, small_disk):
    target = old_output(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ResourceError, match="read-only"):
        finish(source, target, force=True)
    assert contents(target) == OLD


@pytest.mark.parametrize("damage", ["truncated", "nan"])
def test_a_damaged_source_leaves_the_old_output_and_no_litter(source, tmp_path, damage):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][5, 5] = float("nan")
    broken = write_tensors(tmp_path / "broken", config_of("mixtral"), tensors)
    if damage == "truncated":
        data = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(data[:-1000])
    target = old_output(tmp_path / "out")
    with pytest.raises(InputError, match="truncated" if damage == "truncated" else r"experts\.3\.w2.*NaN"):
        finish(broken, target, force=True)
    assert contents(target) == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]

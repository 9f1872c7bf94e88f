"""Converting under kills and full disks, to a GGUF or a folder: all of it or nothing, and then the same bytes."""

import random
import time

import convert_child
import pytest
from families import write_family
from fork_server import start_server

from lmx.core.errors import ResourceError

KILLS = 20
TARGETS = ["m.gguf", "folder", "mistral"]


@pytest.fixture(scope="module")
def server():
    return start_server("convert_child")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("source") / "model", "mixtral")


def contents(target):
    files = [target] if target.is_file() else sorted(target.iterdir())
    return {"the file" if target.is_file() else path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("name", TARGETS)
def test_killed_at_any_moment_it_leaves_nothing_or_all_and_goes_on(server, source, name, tmp_path):
    tensors = convert_child.finish(source, tmp_path / "expected" / name)
    expected = contents(tmp_path / "expected" / name)
    begin = time.perf_counter()
    child = start(server, source, tmp_path / "measure" / name)
    child.join()
    duration, draw = time.perf_counter() - begin, random.Random(4)
    killed = resumed = 0
    for number in range(5 * KILLS):
        if number >= KILLS and killed >= 5 and resumed >= 2:
            break
        target = tmp_path / str(number) / name
        child = start(server, source, target)
        child.join(draw.uniform(0, 1.2 * duration))
        child.kill()
        child.join()
        if target.exists():
            assert contents(target) == expected
            duration *= 0.8  # the machine was busier when it was measured: kill sooner
            continue
        killed += 1
        goes_on = convert_child.finish(source, target) < tensors
        resumed += goes_on
        duration *= 1.0 if goes_on else 1.1  # before anything was written: kill later
        assert contents(target) == expected
        assert list(target.parent.iterdir()) == [target]
    assert killed >= 5
    assert resumed >= 2


def start(server, *args):
    args[1].parent.mkdir(exist_ok=True)
    child = server.Process(target=convert_child.run, args=args)
    child.start()
    return child


@pytest.mark.parametrize("name", TARGETS)
def test_on_a_full_disk_it_says_so_and_goes_on_later(server, source, name, tmp_path):
    target = tmp_path / "full" / name
    child = start(server, source, target, 10_000)
    child.join()
    assert child.exitcode == ResourceError.exit_code
    assert not target.exists()
    convert_child.finish(source, target)
    convert_child.finish(source, tmp_path / "whole" / name)
    assert contents(target) == contents(tmp_path / "whole" / name)

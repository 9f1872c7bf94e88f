"""A pull that is killed at any of its steps on the disk leaves nothing that the next one does not put right."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import LARGE_BYTES, Hub, environment, tree_of
from pulls import SMALL, WEIGHTS, hub_with, left_overs, repository


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(repository(3 * LARGE_BYTES), tmp_path / "cache") as pair:
        yield pair


def whole_after_each_death(hub: Hub, tmp_path: Path, mode: str, stride: int) -> None:
    ran = subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "pull_child.py", tmp_path, mode, str(stride)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment(hub, tmp_path)},
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    steps = int(ran.stdout)
    assert steps > 30
    for step in range(1, steps, stride):
        cache = tmp_path / str(step)
        folder = cache / "model"
        if mode == "folder":
            notes = {f".cache/huggingface/download/{name}.metadata" for name in (*SMALL, WEIGHTS)}
            assert tree_of(folder) == {*SMALL, WEIGHTS, *notes}
        else:
            (repo,) = huggingface_hub.scan_cache_dir(cache).repos
            assert set(repo.refs) == {"main"}
            assert not huggingface_hub.scan_cache_dir(cache).warnings
            assert left_overs(cache) == []
            (revision,) = repo.revisions
            folder = revision.snapshot_path
            assert tree_of(folder) == {*SMALL, WEIGHTS}
        assert all((folder / name).read_bytes() == hub.files[name] for name in (*SMALL, WEIGHTS))


def test_a_death_at_any_step_leaves_nothing_behind(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    whole_after_each_death(hubs[0], tmp_path, "links", 11)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["links", "copies", "folder"])
def test_a_death_at_each_step_leaves_nothing_behind(hubs: tuple[Hub, Hub], tmp_path: Path, mode: str) -> None:
    whole_after_each_death(hubs[0], tmp_path, mode, 1)

"""What is looked at before a job begins to write, and what makes two jobs the same."""

import pytest
from families import write_family

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ConflictError, UsageError
from lmx.core.job import check_job, job_identity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("job") / "model", "olmoe")


def test_a_target_that_holds_the_source_is_refused_even_by_force(folder, tmp_path):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    for source in (Checkpoint.open(folder), Checkpoint.open(linked)):
        for target in (folder, folder.parent):
            with pytest.raises(UsageError, match="holds the source itself"):
                check_job(source, target, force=True)
        check_job(source, folder.parent / "other", force=True)
    with pytest.raises(UsageError, match="holds the source itself"):
        check_job(Checkpoint.open(linked), linked, force=True)


def test_a_file_needs_a_files_name_and_a_folder_another(folder, tmp_path):
    source = Checkpoint.open(folder)
    with pytest.raises(UsageError, match="is the name of a GGUF"):
        check_job(source, tmp_path / "m.gguf", force=False)
    with pytest.raises(UsageError, match="is no name for a GGUF"):
        check_job(source, tmp_path / "m", force=False, makes_file=True)
    check_job(source, tmp_path / "m.gguf", force=False, makes_file=True)


def test_what_exists_is_replaced_by_force_alone(folder, tmp_path):
    source, target = Checkpoint.open(folder), tmp_path / "old"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(ConflictError, match="exists already"):
        check_job(source, target, force=False)
    check_job(source, target, force=True)


def test_a_job_is_the_same_for_the_same_source_and_settings(folder):
    source = Checkpoint.open(folder)
    one = job_identity(source, (), "plain", 1)
    assert one == job_identity(Checkpoint.open(folder), (), "plain", 1)
    assert one != job_identity(source, (), "plain", 2)

"""What loading does to the garbage collector, and leaves behind."""

import gc

import pytest

from lmx.core.uncollected import uncollected


def test_collecting_rests_and_goes_on() -> None:
    before = gc.get_freeze_count()
    with uncollected(), uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(5000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.unfreeze()


def test_an_error_lets_it_go_on() -> None:
    with pytest.raises(ValueError, match="wrong"), uncollected():
        raise ValueError("wrong")
    assert gc.isenabled()
    gc.unfreeze()


def test_where_it_rests_already_it_rests_on() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

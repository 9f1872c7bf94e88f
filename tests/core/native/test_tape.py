"""Kernels noted and called again: the same numbers, from whatever lies at their addresses by then."""

import subprocess
import sys
import threading

import pytest
import torch
from native_paths import needs_kernels, path  # noqa: F401

from lmx.core.native.add import add, can_add
from lmx.core.native.norm import rms_norm
from lmx.core.native.tape import recording

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]


def chain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return add(rms_norm(add(x, x, x.dtype), weight, 1e-5).view(3, 8, 32).flatten(1), x, x.dtype)


def test_a_tape_answers_for_what_its_entry_holds() -> None:
    weight, x = torch.rand(256), torch.randn(3, 256)
    with recording() as tape:
        out = chain(x, weight)
    assert tape.foreign is None
    assert len(tape) == 3
    for _ in range(3):
        x.normal_()
        tape.replay()
        assert torch.equal(out, chain(x, weight))
    assert len(tape) == 3, "nothing is noted once it is closed"


def test_what_a_tape_points_to_lives_on() -> None:
    x, weight = torch.randn(1, 4096), torch.rand(4096)
    with recording() as tape:
        out = rms_norm(add(x, x, x.dtype), weight, 1e-5)
    for _ in range(50):  # would take the place of what was freed
        torch.full((1, 4096), torch.nan)
    tape.replay()
    assert torch.equal(out, rms_norm(x + x, weight, 1e-5))


def test_recording_does_not_import_torchs_compiler() -> None:
    code = """if True:
        import sys, torch
        from lmx.core.native.tape import recording
        with recording() as tape:
            torch.empty(6).view(2, 3)
        assert tape.foreign is None
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("foreign", [torch.neg, lambda x: x + 1, lambda x: x.t().contiguous(), lambda x: x.copy_(x)])
def test_a_foreign_operation_is_found(foreign: object) -> None:
    x = torch.randn(2, 64)
    with recording() as tape:
        foreign(add(x, x, x.dtype))  # type: ignore[operator]
    assert tape.foreign is not None


def test_other_threads_and_failures_leave_no_trace() -> None:
    x = torch.randn(1, 64)
    with recording() as tape:
        thread = threading.Thread(target=add, args=(x, x, x.dtype))
        thread.start()
        thread.join()
    assert len(tape) == 0

    def fail() -> None:
        with recording():
            add(x, x, x.dtype)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with recording() as tape:
        pass
    add(x, x, x.dtype)
    assert len(tape) == 0


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 130), (2, 5, 64), (70, 1030)])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_are_torchs(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], bias: bool) -> None:
    x, y = torch.randn(shape, dtype=dtypes[0]), torch.randn(shape[-1:] if bias else shape, dtype=dtypes[1])
    y.view(-1)[0], x.view(-1)[-1] = torch.nan, torch.inf
    assert can_add(x, y)
    assert torch.equal(add(x, y, dtypes[2]).nan_to_num(7.0), (x + y).nan_to_num(7.0))


def test_a_narrow_sum_may_be_wide() -> None:
    x, y = torch.randn(3, 70).bfloat16(), torch.randn(3, 70).bfloat16()
    assert torch.equal(add(x, y, torch.float32), x.float() + y)
    assert torch.equal(add(x.float(), y, torch.float32), x.float() + y)
    assert not can_add(x, y.float())
    assert not can_add(x[:, ::2], y[:, ::2])
    assert not can_add(x, y[:2])

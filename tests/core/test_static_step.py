"""The step that is captured: it asks nothing of the host, for any family, and stays on the device."""

import pytest
import torch
from device_bank import with_device_banks
from families import FAMILIES, config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmx.core.loader import build
from lmx.core.model import LanguageModel
from lmx.core.sampling import Sampler, Sampling
from lmx.core.static_step import StaticStep

META = torch.device("meta")


class _Devices(TorchDispatchMode):
    """Where the tensors of all operations lie."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen |= {value.device.type for value in tree_leaves((args, kwargs, made)) if isinstance(value, Tensor)}
        return made


def without_memory(family: str, *, device_banks: bool = True) -> LanguageModel:
    """A model on a device that has no numbers: whoever wants to see one there fails."""
    with META:
        model = build(config_of(family)).eval()
        return with_device_banks(model) if device_banks else model


def steps(model: LanguageModel, sampler: Sampler | None, rows: int) -> StaticStep:
    """A step that was run twice, in the second of which all tensors were watched."""
    state = model.make_state(rows)
    with torch.no_grad():
        logits = model(torch.ones(rows, 9, dtype=torch.int64, device=META), state=state, logits_to_keep=1).logits
        step = StaticStep(model, state, sampler)
        step.prepare()
        step.choose(logits[0, -1])
        for _ in range(2):
            with _Devices() as devices:
                step.run()
            step.count()
    assert devices.seen == {"meta"}
    return step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_no_number_leaves_the_device(family: str, rows: int) -> None:
    sampling = Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repeat_penalty=1.1, frequency_penalty=0.1)
    if rows == 1:
        assert steps(without_memory(family), Sampler(sampling, [1, 2]), 1).report.shape == (2,)
    assert steps(without_memory(family), None, rows).logits.shape == (rows, 96)


def test_a_bank_that_asks_the_host_is_found_out() -> None:
    with pytest.raises(RuntimeError, match=r"[Mm]eta tensors"):
        steps(without_memory("olmoe", device_banks=False), None, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_moves_from_step_to_step(family: str) -> None:
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = with_device_banks(build(config_of(family)).eval())
    model.reset_parameters()
    state = model.make_state()
    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64), state=state)
        step = StaticStep(model, state, Sampler(Sampling(), []))
        places = [buffer.data_ptr() for layer in state.layers for buffer in layer.buffers]
        for _ in range(5):
            step.run()
            step.count()
            assert places == [buffer.data_ptr() for layer in state.layers for buffer in layer.buffers]
            assert step.follows
    assert state.length == 14

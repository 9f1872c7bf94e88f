"""A bank of plain experts: one call of the kernels a layer for a few tokens."""

import copy
import pickle

import pytest
import torch
from support import needs_kernels

from lmx.core.layers.moe import ExpertBank, run_experts
from lmx.core.native.vector import ExpertTable


@pytest.fixture
def used(monkeypatch):
    """The numbers of tokens that the kernels were given."""
    calls = []
    answer = ExpertTable.answer
    monkeypatch.setattr(ExpertTable, "answer", lambda self, x, *of: (calls.append(len(x)), answer(self, x, *of))[1])
    return calls


def make_bank(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank = ExpertBank(4, 64, 96, "silu").requires_grad_(False)
    for parameter in bank.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return bank.to(dtype)


def make_call(tokens=1, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    return x, torch.tensor([[2, 0], [3, 1], [2, 3], [1, 0], [0, 3]])[:tokens], torch.full((tokens, 2), 0.5)


def check(bank, call):
    x, ids, weights = call
    matrices = [[m.double() for m in part] for part in (bank.gate, bank.up, bank.down)]
    expected = run_experts(x.double(), ids, weights.double(), *matrices, "silu")
    assert (bank(*call).double() - expected).norm() < 1e-2 * expected.norm()


@needs_kernels
@torch.no_grad()
def test_few_tokens_take_the_kernels(used):
    bank = make_bank()
    for tokens in (1, 4, 5):
        check(bank, make_call(tokens))
    check(make_bank(torch.float16), make_call(1, torch.float16))
    for dtype in (torch.float32, torch.float64):  # torch reads wide weights at the speed of memory
        check(make_bank(dtype), make_call(1, dtype))
    assert used == [1, 4, 1]


@needs_kernels
@torch.no_grad()
def test_the_kernels_follow_the_weights(used):
    bank, other = make_bank(), make_bank(seed=1)
    check(bank, make_call())
    bank.down[2].mul_(3)  # in place
    check(bank, make_call())
    bank.load_state_dict(other.state_dict(), assign=True)
    check(bank, make_call())
    bank.gate[0].data = torch.zeros_like(bank.gate[0])
    check(bank, make_call())
    check(bank.half(), make_call(1, torch.float16))
    assert used == [1] * 5


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))], ids=["copy", "pickle"]
)
def test_a_copy_has_weights_of_its_own(copied):
    bank = make_bank()
    before = bank(*make_call())
    size = len(pickle.dumps(make_bank()))
    assert len(pickle.dumps(bank)) == size  # no weight twice
    twin = copied(bank)
    for parameter in bank.parameters():
        parameter.zero_()
    assert not bank(*make_call()).any()
    assert torch.equal(twin(*make_call()), before)

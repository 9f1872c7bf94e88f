"""What tests of captured steps share: small models, the oracle, and answers by graphs, on any device."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from device_bank import with_device_banks
from families import config_of
from frozen_graph import FrozenGraph

from lmx.core.graph_stepper import Graph, GraphStepper
from lmx.core.model import AnyState, LanguageModel
from lmx.core.native.compiled import library
from lmx.core.sampling import Sampler, Sampling
from lmx.core.stepper import one_by_one
from lmx.presets import build_dummy

GREEDY = Sampling(frequency_penalty=2.0)
"""Deterministic, and varied even where random weights would repeat one token."""
PLAIN = Sampling()
MakeGraph = Callable[[torch.device], Graph]


def small(family: str, scheme: str | None = None, dtype: str = "fp32", **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    return with_device_banks(build_dummy(config_of(family, **changes), scheme, dtype=dtype))


def prompt(columns: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: LanguageModel, ids: torch.Tensor) -> tuple[AnyState, torch.Tensor]:
    """A state that holds the ids, and the logits of the last."""
    state = model.make_state(len(ids))
    return state, model(ids.to(model.device), state=state, logits_to_keep=1).logits[:, -1]


def called(model: LanguageModel, state: AnyState, logits: torch.Tensor, sampler: Sampler, count: int) -> list[int]:
    """The oracle: the model called for each token, which the host chooses. The state lacks the last one, as ever."""

    @torch.no_grad()
    def step(token_id: int) -> torch.Tensor:
        return model(torch.tensor([[token_id]], device=model.device), state=state, logits_to_keep=1).logits[0, -1]

    return [chosen.token_id for chosen in itertools.islice(one_by_one(step, logits[0], sampler), count)]


def graphed(
    model: LanguageModel,
    state: AnyState,
    logits: torch.Tensor,
    sampler: Sampler,
    count: int,
    limit: int | None = None,
    make_graph: MakeGraph = FrozenGraph,
) -> list[int]:
    """As many tokens by captured steps; the answer is given up then, if `limit` does not end it."""
    stepper = GraphStepper(model, state, make_graph)
    with closing(stepper.choices(logits[0], sampler, limit)) as choices:
        tokens = [chosen.token_id for chosen in itertools.islice(choices, count)]
    assert stepper.refusal is None
    return tokens


def assert_same(one: AnyState, other: AnyState, tolerance: float = 1e-4) -> None:
    assert one.length == other.length
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        pairs = zip(mine.tensors(one.length).values(), theirs.tensors(other.length).values(), strict=True)
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Leave the CPU's kernels out of what is built and run inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMX_KERNELS", "torch")
        library.cache_clear()
        yield
    library.cache_clear()

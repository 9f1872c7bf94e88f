"""What tests on a card share: the card, and how far 16-bit answers may be apart."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lmx.core.model import AnyState, LanguageModel

CARD = torch.device("cuda", 0)


def run(model: LanguageModel, ids: Tensor, cuts: Sequence[int] = (), state: AnyState | None = None) -> Tensor:
    """The logits of all tokens on the CPU, in float32, from calls that end at the cuts."""
    state = state or model.make_state(len(ids))
    edges = [0, *cuts, ids.shape[1]]
    with torch.no_grad():
        parts = [model(ids[:, a:b].to(model.device), state=state).logits for a, b in pairwise(edges)]
    return torch.cat([part.cpu() for part in parts], 1).float()


def greedy(model: LanguageModel, prompt: Sequence[int], tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """The likeliest tokens, one after another, as generation takes them."""
    state, answer = model.make_state(), list[int]()
    logits = run(model, torch.tensor([prompt]), (), state)[0, -1]
    stepper = model.stepper(state)
    while True:
        answer.append(int(logits.argmax()))
        if len(answer) == tokens or answer[-1] in stop_ids:
            return answer
        logits = stepper.feed(torch.tensor([answer[-1:]], device=model.device))[0].cpu()


def error(answer: Tensor, expected: Tensor) -> float:
    """The relative error of a typical token's logits: of one in two, since an expert may be chosen by a hair."""
    apart = (answer - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(apart.median())

"""The trained checkpoints of ../shared, quantized while loading: what they lose, and that they still say the same."""

import json
from functools import cache
from statistics import geometric_mean

import pytest
import torch
from support import SHARED, needs_shared

from lmx.core.checkpoint import Checkpoint
from lmx.core.evaluate import Evaluation, evaluate
from lmx.core.loader import load_model
from lmx.core.registry import MODEL_TYPES
from lmx.quant.apply import load_quantized
from lmx.quant.spec import QuantSpec

pytestmark = needs_shared
# nats a token that a scheme may cost
ALLOWED = {"nf4": 0.002, "int8": 0.0002, "qint4": 0.002}


@cache
def expected(family):
    return json.loads((SHARED / "checkpoints" / family / "expected.json").read_text())


@cache
def model_of(family, scheme):
    checkpoint = Checkpoint.open(SHARED / "checkpoints" / family)
    if scheme == "plain":
        return load_model(checkpoint, dtype=torch.float32)
    return load_quantized(checkpoint, spec=QuantSpec(scheme), dtype=torch.float32)


@cache
def evaluated(family, scheme) -> Evaluation:
    *_, result = evaluate(model_of(family, scheme), expected(family)["eval_ids"], model_of(family, "plain"))
    assert isinstance(result, Evaluation)
    return result


@torch.no_grad()
def is_greedy(model, prompt, answer):
    """Whether each token of an answer is the likeliest after those before it: then greedy decoding finds it."""
    logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("scheme", ALLOWED)
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_loss_and_replies_hold(family, scheme):
    assert evaluated(family, scheme).nll - expected(family)["eval_nll"] < ALLOWED[scheme]
    for conversation in expected(family)["conversations"]:
        assert is_greedy(model_of(family, scheme), conversation["prompt_ids"], conversation["greedy_ids"])


def test_the_measure_sees_the_order_of_the_schemes():
    """FP4 spends its codes on the tails that weights do not have, NF4 does not, and int8 has sixteen times as many.

    qint4 spaces its codes evenly between the extremes of a group and comes out beside NF4; qint2 has four codes.
    Over all families: in one with few experts a single token that is routed elsewhere can outweigh all others.
    """
    int8, nf4, fp4, qint4, qint2 = (
        geometric_mean(evaluated(family, scheme).kl_divergence for family in MODEL_TYPES)
        for scheme in ("int8", "nf4", "fp4", "qint4", "qint2")
    )
    assert 0 < 30 * int8 < min(nf4, qint4)
    assert nf4 * 1.1 < fp4
    assert max(fp4, qint4) * 50 < qint2


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_two_bits_fail_where_four_pass(family):
    """The bound that NF4 keeps is one that a bad quantization does not."""
    assert evaluated(family, "qint2").nll - expected(family)["eval_nll"] > ALLOWED["nf4"]

import json
import math

import pytest
import torch
import torch.nn.functional as F
from support import SHARED, needs_shared
from transformers import AutoModelForCausalLM, FalconMambaConfig, MixtralConfig, RecurrentGemmaConfig

from lmx.core import evaluate as module
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.evaluate import Evaluation, Progress, evaluate, windows
from lmx.core.layers.moe import route
from lmx.core.loader import build, load_model

CONFIGS = {
    "mixtral": MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        max_position_embeddings=64,
    ),
    "falcon_mamba": FalconMambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, state_size=4),
    "recurrent_gemma": RecurrentGemmaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=8,
    ),
}
LENGTHS = (2, 9, 40)
SEQUENCES = [
    torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
]


def make(family, seed=0):
    torch.manual_seed(seed)
    model = build(CONFIGS[family].to_dict())
    model.reset_parameters()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    return model.eval()


def near(model, scale=0.05):
    """The same model with some noise in its weights."""
    other = make(model.family)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * scale)
    return other


def result(*args):
    *progress, last = evaluate(*args)
    assert all(isinstance(step, Progress) for step in progress)
    assert isinstance(last, Evaluation)
    return last


@pytest.fixture(params=[512, 7])
def piece(request, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_is_that_of_transformers(family, tmp_path):
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(Checkpoint.open(tmp_path))
    total = 0.0
    with torch.no_grad():
        for ids in SEQUENCES:
            row = torch.tensor([ids])
            total += theirs(row, labels=row).loss.item() * (len(ids) - 1)
    got = result(ours, SEQUENCES)
    assert got.tokens == sum(LENGTHS) - len(LENGTHS)
    assert got.nll == pytest.approx(total / got.tokens, abs=1e-5)
    assert got.perplexity == pytest.approx(math.exp(total / got.tokens), rel=1e-5)
    assert (got.kl_divergence, got.top1_agreement, got.routing_agreement, got.state_drift) == (None,) * 4


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_comparison_follows_the_definitions(family):
    base = make(family)
    model = near(base)
    divergence = same = tokens = routed = agreed = 0.0
    drifts = []
    for ids in SEQUENCES:
        states = [base.make_state(1), model.make_state(1)]
        p, q = (
            m(torch.tensor([ids]), state=state, output_router_logits=True)
            for m, state in zip((base, model), states, strict=True)
        )
        logs = [output.logits[0, :-1].double().log_softmax(-1) for output in (p, q)]
        divergence += F.kl_div(logs[1], logs[0], reduction="sum", log_target=True).item()
        same += (logs[0].argmax(-1) == logs[1].argmax(-1)).sum().item()
        tokens += len(ids) - 1
        for theirs, ours in zip(p.router_logits, q.router_logits, strict=True):
            for row, other in zip(theirs, ours, strict=True):
                sets = [set(route(logits[None], 2, None)[0][0].tolist()) for logits in (row, other)]
                agreed += sets[0] == sets[1]
                routed += 1
        hidden = [
            torch.cat([x.hidden.flatten() for x in s.layers if hasattr(x, "hidden")] or [p.logits]) for s in states
        ]
        drifts.append(((hidden[1] - hidden[0]).norm() / hidden[0].norm()).item())
    got = result(model, SEQUENCES, base)
    assert got.kl_divergence == pytest.approx(divergence / tokens, rel=1e-3)
    assert got.kl_divergence > 1e-5
    assert got.top1_agreement == same / tokens
    if family == "mixtral":
        assert 0 < got.routing_agreement < 1
        assert got.routing_agreement == pytest.approx(agreed / routed)
        assert got.state_drift is None
    else:
        assert got.routing_agreement is None
        assert got.state_drift == pytest.approx(sum(drifts) / len(drifts), rel=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_agrees_with_itself(family):
    model = make(family)
    got = result(model, SEQUENCES, model)
    assert (got.kl_divergence, got.top1_agreement) == (0.0, 1.0)
    assert got.routing_agreement == (1.0 if family == "mixtral" else None)
    assert got.state_drift == (None if family == "mixtral" else 0.0)


def test_divergence_grows_with_the_distance():
    base = make("mixtral")
    found = [result(near(base, scale), SEQUENCES, base).kl_divergence for scale in (0.01, 0.05, 0.25)]
    assert found == sorted(found)
    assert found[0] > 0


def test_progress_counts_the_tokens(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 16)
    *steps, last = evaluate(make("falcon_mamba"), SEQUENCES)
    assert [step.tokens for step in steps] == [2, 11, 27, 43, 51]
    assert {step.total for step in steps} == {51}
    assert steps[-1].nll == last.nll


def test_windows_do_not_overlap_and_begin_with_bos():
    ids = list(range(10, 31))
    assert windows(ids, 8, None) == [ids[:8], ids[8:16], ids[16:]]
    assert windows(ids, 8, 1) == [[1, *ids[:7]], [1, *ids[7:14]], [1, *ids[14:]]]
    assert windows(ids[:17], 8, None) == [ids[:8], ids[8:16]]  # a lone token has nothing before it
    assert windows(ids[:15], 8, 1)[-1] == [1, ids[14]]
    for context, bos in [(1, 1), (1, None), (0, None)]:
        with pytest.raises(InputError, match="nothing to predict"):
            windows(ids, context, bos)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "nothing to evaluate"),
        ([[4, 5], [4]], "sequence 2 has 1 tokens"),
        ([[4] * 65], "context 64"),
        ([[4, 50]], "beyond the 50 tokens"),
        ([[-1, 4]], "beyond the 50 tokens"),
    ],
)
def test_sequences_that_cannot_be_scored(sequences, message):
    with pytest.raises(InputError, match=message):
        result(make("mixtral"), sequences)


def test_models_that_cannot_be_compared():
    with pytest.raises(InputError, match="cannot be compared"):
        result(make("mixtral"), SEQUENCES, make("falcon_mamba"))


def test_logits_that_are_no_numbers():
    model = make("mixtral")
    model.head.weight.data[7] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        result(model, SEQUENCES)


@needs_shared
@pytest.mark.parametrize("family", CONFIGS)
def test_trained_checkpoints_lose_what_transformers_measured(family):
    folder = SHARED / "checkpoints" / family
    expected = json.loads((folder / "expected.json").read_text())
    model = load_model(Checkpoint.open(folder), dtype=torch.float32)
    assert result(model, expected["eval_ids"]).nll == pytest.approx(expected["eval_nll"], abs=1e-5)

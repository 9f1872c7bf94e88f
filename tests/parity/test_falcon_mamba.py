"""FalconMamba against transformers on random small configs."""

import pytest
import torch
from torch import Tensor
from transformers import FalconMambaForCausalLM

from lmx.core.models.falcon_mamba import FalconMambaConfig
from parity.families import FALCON_MAMBA, SEEDS, Pair, build_reference, close, load_ours, pair, random_ids
from parity.recurrent import HOLES, gradients_agree

LENGTH = 21


@pytest.fixture(params=SEEDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(FALCON_MAMBA, request.param)


@torch.no_grad()
def test_logits_loss_and_hidden_states(both: Pair) -> None:
    ids = random_ids(2, LENGTH)
    labels = ids.masked_fill(random_ids(2, LENGTH, seed=1) % 3 == 0, -100)
    expected = both.reference(ids, labels=labels, output_hidden_states=True)
    answer = both.ours(ids, labels=labels, output_hidden_states=True)
    assert expected.logits.abs().max() > 1
    close(answer.logits, expected.logits)
    close(answer.loss, expected.loss)
    # transformers leaves out the embeddings and gives the last layer's output both before and after the norm.
    assert len(answer.hidden_states) == both.ours.config.layers + 1
    assert torch.equal(answer.hidden_states[0], both.reference.backbone.embeddings(ids))
    both_have = (*expected.hidden_states[:-2], expected.hidden_states[-1])
    for mine, other in zip(answer.hidden_states[1:], both_have, strict=True):
        close(mine, other)
    assert answer.attentions is answer.router_logits is None


def test_gradients(both: Pair) -> None:
    gradients_agree(both, random_ids(2, LENGTH))


@torch.no_grad()
def test_embeddings_in_and_few_logits_out(both: Pair) -> None:
    embeds = torch.randn(2, 9, both.ours.config.hidden_size, generator=torch.Generator().manual_seed(0))
    close(both.ours(inputs_embeds=embeds).logits, both.reference(inputs_embeds=embeds).logits)
    ids = random_ids(2, LENGTH)
    for keep in (1, 4, torch.tensor([0, 5, 20])):
        close(both.ours(ids, logits_to_keep=keep).logits, both.reference(ids, logits_to_keep=keep).logits)


@torch.no_grad()
def test_padded_rows_equal_their_single_unpadded_passes(both: Pair) -> None:
    # Against rows of their own, since transformers' left padding is wrong with `use_bias` (see below).
    ids = random_ids(*HOLES.shape)
    logits = both.ours(ids, attention_mask=HOLES).logits
    for row, real in enumerate(HOLES.bool()):
        close(logits[row, real], both.reference(ids[row, real][None]).logits[0])


def exact(reference: FalconMambaForCausalLM, ids: Tensor) -> Tensor:
    """Logits of the same weights in float32."""
    wide = FalconMambaForCausalLM(reference.config).eval()
    wide.load_state_dict({name: weight.float() for name, weight in reference.state_dict().items()})
    return wide(ids).logits


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@torch.no_grad()
def test_bfloat16_follows_the_residual_switch(residual_in_fp32: bool) -> None:
    # Of two bfloat16 runs neither is the truth: ours may be as far from float32 as theirs.
    config = pair(FALCON_MAMBA, 5).config | {"residual_in_fp32": residual_in_fp32}
    reference = build_reference(FALCON_MAMBA, config).to(torch.bfloat16)
    model, ids = load_ours(FALCON_MAMBA, reference), random_ids(2, 40)
    mine, theirs = (run(ids, output_hidden_states=True) for run in (model, reference))
    assert mine.hidden_states[1].dtype == theirs.hidden_states[0].dtype
    assert mine.hidden_states[1].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    truth = exact(reference, ids)
    assert (mine.logits - truth).abs().mean() <= 1.2 * (theirs.logits - truth).abs().mean()


@torch.no_grad()
def test_transformers_still_forgets_its_state_in_a_continuation_of_several_tokens() -> None:
    """A record of why we do not compare with it: when this fails, it has been mended and can be compared with."""
    both, ids = pair(FALCON_MAMBA, 2), random_ids(1, LENGTH)
    whole = both.reference(ids).logits[:, 12:]
    past = both.reference(ids[:, :12], use_cache=True).cache_params
    assert (both.reference(ids[:, 12:], cache_params=past, use_cache=True).logits - whole).abs().max() > 1e-2
    state = both.ours.make_state()
    both.ours(ids[:, :12], state=state)
    close(both.ours(ids[:, 12:], state=state).logits, whole)


@torch.no_grad()
def test_transformers_still_lets_left_padding_into_its_convolution() -> None:
    """The same record for left padding: with `use_bias` it is no longer zero when it is convolved."""
    both, ids = pair(FALCON_MAMBA, 1), random_ids(1, LENGTH)
    assert both.config["use_bias"]
    alone = both.reference(ids).logits
    padded = torch.cat((torch.zeros_like(ids[:, :5]), ids), 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    assert (both.reference(padded, attention_mask=mask).logits[:, 5:] - alone).abs().max() > 1e-3
    close(both.ours(padded, attention_mask=mask).logits[:, 5:], alone)


def test_widths_follow_the_config() -> None:
    published = {"model_type": "falcon_mamba", "vocab_size": 8, "hidden_size": 40, "num_hidden_layers": 1}
    assert FalconMambaConfig.parse({**published, "expand": 16, "intermediate_size": 56}).intermediate_size == 56
    assert FalconMambaConfig.parse({**published, "expand": 3}).intermediate_size == 120
    assert FalconMambaConfig.parse({**published, "time_step_rank": "auto"}).time_step_rank == 3
    assert FalconMambaConfig.parse({**published, "time_step_rank": 7}).time_step_rank == 7

"""What is special to FalconMamba, against transformers: padding in any place, and where transformers is wrong."""

import pytest
import torch
from parity.families import FALCON_MAMBA, SEEDS, Pair, build_reference, close, load_ours, pair, random_ids
from parity.recurrent import HOLES
from torch import Tensor
from transformers import FalconMambaForCausalLM

from lmx.core.models.falcon_mamba import FalconMambaConfig

LENGTH = 21


@pytest.fixture(params=SEEDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(FALCON_MAMBA, request.param)


@torch.no_grad()
def test_hidden_states_begin_with_the_embeddings(both: Pair) -> None:
    """transformers leaves them out, and gives the last layer's output both before and after the norm."""
    ids = random_ids(2, LENGTH)
    states = both.ours(ids, output_hidden_states=True).hidden_states
    assert states is not None
    assert torch.equal(states[0], both.reference.backbone.embeddings(ids))


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

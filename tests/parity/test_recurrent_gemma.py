"""What is special to RecurrentGemma, against transformers: resets, padding in any place, its config's spellings.

Its model keeps state in its modules once it was called with a cache, so every reference call here is without one.
"""

import json
from pathlib import Path

import pytest
import torch
from parity.families import RECURRENT_GEMMA, SEEDS, Pair, close, pair, random_ids
from parity.recurrent import HOLES
from torch import Tensor
from transformers import DynamicCache, RecurrentGemmaForCausalLM

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.models.recurrent_gemma import RecurrentGemmaConfig

LENGTH = 21


@pytest.fixture(params=SEEDS)
def both(request: pytest.FixtureRequest) -> Pair:
    fresh((found := pair(RECURRENT_GEMMA, request.param)).reference)
    return found


def fresh(reference: RecurrentGemmaForCausalLM) -> RecurrentGemmaForCausalLM:
    """Forget what an earlier call left in the reference's modules."""
    for layer in reference.model.layers:
        if hasattr(layer.temporal_block, "rg_lru"):
            layer.temporal_block.rg_lru.recurrent_states = None
            layer.temporal_block.conv1d_state = None
    return reference


def alone(reference: RecurrentGemmaForCausalLM, ids: Tensor | None = None, **arguments: object) -> Tensor:
    """The reference's logits in one pass without any state."""
    logits: Tensor = fresh(reference)(ids, use_cache=False, **arguments).logits
    return logits


@torch.no_grad()
def test_positions_turn_the_heads_and_reset_the_recurrence_where_they_are_zero(both: Pair) -> None:
    ids = random_ids(2, LENGTH)
    shifted = torch.arange(5, 5 + LENGTH)[None]
    packed = torch.cat((torch.arange(9), torch.arange(4), torch.arange(8)))[None]
    rows = torch.cat((packed, torch.arange(LENGTH)[None]))
    for positions in (shifted, packed, rows):
        expected = alone(both.reference, ids, position_ids=positions.expand(2, -1))
        close(both.ours(ids, position_ids=positions).logits, expected)


@torch.no_grad()
def test_texts_packed_in_a_row_do_not_see_each_other() -> None:
    both, ids = pair(RECURRENT_GEMMA, 1), random_ids(1, LENGTH)
    assert both.config["block_types"] == ["attention"]  # a convolution is not reset, as in transformers
    positions = torch.cat((torch.arange(9), torch.arange(LENGTH - 9)))[None]
    close(both.ours(ids, position_ids=positions).logits[:, 9:], both.ours(ids[:, 9:]).logits, 1e-5)


@torch.no_grad()
def test_padded_rows_equal_their_single_unpadded_passes(both: Pair) -> None:
    # Against rows of their own, since transformers convolves its padding and folds it in (see below).
    ids = random_ids(*HOLES.shape)
    logits = both.ours(ids, attention_mask=HOLES).logits
    for row, real in enumerate(HOLES.bool()):
        close(logits[row, real], alone(both.reference, ids[row, real][None])[0])


def edited(reference: RecurrentGemmaForCausalLM, folder: Path, **changes: object) -> LanguageModel:
    """Our model over the reference's files with another config.json."""
    reference.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return load_model(Checkpoint.open(folder))


@torch.no_grad()
def test_unscaled_embeddings(tmp_path: Path) -> None:
    # transformers has no such switch: undo its scaling beforehand.
    reference, ids = pair(RECURRENT_GEMMA, 4).reference, random_ids(2, LENGTH)
    model = edited(reference, tmp_path, embeddings_scale_by_sqrt_dim=False)
    embeds = reference.model.embed_tokens(ids) / reference.model.normalizer
    close(model(ids).logits, alone(reference, inputs_embeds=embeds))


@torch.no_grad()
def test_a_stored_output_matrix_wins_over_a_config_that_ties_it(tmp_path: Path) -> None:
    reference, ids = pair(RECURRENT_GEMMA, 3).reference, random_ids(2, LENGTH)
    model = edited(reference, tmp_path, tie_word_embeddings=True)
    close(model(ids).logits, alone(reference, ids))


@torch.no_grad()
def test_no_soft_cap(tmp_path: Path) -> None:
    reference, ids = pair(RECURRENT_GEMMA, 4).reference, random_ids(2, LENGTH)
    hidden = fresh(reference).model(ids, use_cache=False).last_hidden_state
    close(edited(reference, tmp_path, logits_soft_cap=None)(ids).logits, reference.lm_head(hidden))


@torch.no_grad()
def test_transformers_still_breaks_a_continuation_of_several_tokens() -> None:
    """A record of why we do not compare with it: when this fails, it has been mended and can be compared with."""
    both, ids = pair(RECURRENT_GEMMA, 8), random_ids(1, LENGTH)
    reference, model = both.reference, both.ours
    whole = alone(reference, ids)[:, 12:]
    fresh(reference)
    past = DynamicCache(config=reference.config)
    reference.model._setup_cache(reference.config, 1, ids.device, torch.float32)
    reference(ids[:, :12], use_cache=True, past_key_values=past)
    continued = reference(ids[:, 12:], use_cache=True, past_key_values=past).logits
    assert (continued - whole).abs().max() > 1e-2
    fresh(reference)
    state = model.make_state()
    model(ids[:, :12], state=state)
    close(model(ids[:, 12:], state=state).logits, whole)


@torch.no_grad()
def test_transformers_still_folds_left_padding_in() -> None:
    """The same record for left padding."""
    both, ids = pair(RECURRENT_GEMMA, 0), random_ids(1, LENGTH)
    reference, model = both.reference, both.ours
    expected = alone(reference, ids)
    padded = torch.cat((torch.zeros_like(ids[:, :5]), ids), 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = alone(reference, padded, attention_mask=mask, position_ids=positions)
    assert (theirs[:, 5:] - expected).abs().max() > 1e-3
    close(model(padded, attention_mask=mask).logits[:, 5:], expected)


SMALL = {
    "model_type": "recurrent_gemma",
    "vocab_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,
}


def test_block_types_cycle_in_either_spelling() -> None:
    short = {"recurrent": "r", "attention": "a"}

    def spelled(**changes: object) -> str:
        return "".join(short[kind] for kind in RecurrentGemmaConfig.parse({**SMALL, **changes}).block_types)

    assert spelled() == "rrarr"
    assert spelled(block_types=["attention", "recurrent"]) == "arara"
    assert spelled(_block_types=["recurrent", "attention"]) == "rarar"
    assert spelled(block_types=["recurrent"] * 4 + ["attention"] * 4) == "rrrra"
    with pytest.raises(InputError, match="block_types"):
        spelled(block_types=["recurrent", "mamba"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 3), ("lru_width", 15), ("head_dim", 1), ("logits_soft_cap", -1.0), ("window", 4)],
)
def test_what_cannot_be_honoured_is_refused_by_name(key: str, value: object) -> None:
    extra = {"partial_rotary_factor": 1.0} if key == "head_dim" else {}
    with pytest.raises(InputError, match=key):
        RecurrentGemmaConfig.parse({**SMALL, **extra, key: value})

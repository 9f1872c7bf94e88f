"""RecurrentGemma against transformers on random small configs.

Its model keeps state in its modules once it was called with a cache, so every reference call here is without one.
"""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from parity.pairs import close, gradients_agree, ours, shake
from torch import Tensor
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.models.recurrent_gemma import RecurrentGemmaConfig as OurConfig

SEEDS = range(14)
BLOCK_TYPES = [
    ["recurrent", "recurrent", "attention"],
    ["attention"],
    ["recurrent"],
    ["attention", "recurrent"],
    ["recurrent", "attention", "attention", "recurrent"],
]
Pair = tuple[RecurrentGemmaForCausalLM, LanguageModel]


def random_config(seed: int) -> RecurrentGemmaConfig:
    """Switches cycle with the seed, so that a dozen seeds meet every value of each; widths are drawn."""
    draw = random.Random(seed)
    heads, kv_heads = [(4, 1), (4, 2), (3, 3), (1, 1), (6, 2)][seed % 5]
    width = {"head_dim": draw.choice([6, 8, 16])} if seed % 2 else {}
    return RecurrentGemmaConfig(
        vocab_size=61,
        hidden_size=heads * draw.choice([4, 8]),
        intermediate_size=2 * draw.choice([12, 20]),
        num_hidden_layers=1 + seed % 5,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        lru_width=[None, heads * 5, heads * 8][seed % 3],
        attention_window_size=[3, 8, 64][seed // 2 % 3],
        conv1d_width=2 + seed % 4,
        logits_soft_cap=draw.choice([2.0, 30.0]),
        rms_norm_eps=draw.choice([1e-6, 1e-2]),
        hidden_activation=["gelu_pytorch_tanh", "silu"][seed % 2],
        block_types=BLOCK_TYPES[seed % 5],
        attention_bias=seed % 2 == 0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": draw.choice([50.0, 10000.0]),
            "partial_rotary_factor": [0.5, 1.0, 0.25][seed % 3],
        },
        tie_word_embeddings=seed % 2 == 0,
        attn_implementation="eager",
        **width,
    )


@cache
def pair(seed: int) -> Pair:
    torch.manual_seed(seed)
    reference = RecurrentGemmaForCausalLM(random_config(seed)).eval()
    shake(reference, seed)
    return reference, ours(reference)


def tokens(seed: int, batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_loss_hidden_states_and_attentions(seed: int) -> None:
    reference, model = pair(seed)
    ids = tokens(seed)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3, -100)
    asked = {"labels": labels, "output_hidden_states": True, "output_attentions": True}
    expected = fresh(reference)(ids, use_cache=False, **asked)
    output = model(ids, **asked)
    close(output.logits, expected.logits, what="logits")
    close(model(ids).logits, expected.logits, what="logits without attention weights")
    assert output.loss is not None
    close(output.loss, expected.loss, what="loss")
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(output, name), getattr(expected, name) or ()
        assert mine is not None
        for index, (actual, other) in enumerate(zip(mine, theirs, strict=True)):
            close(actual, other, what=f"{name} {index}")


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed: int) -> None:
    reference, model = pair(seed)
    ids = tokens(seed)
    reference.zero_grad()
    model.zero_grad()
    fresh(reference)(ids, labels=ids, use_cache=False).loss.backward()
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    gradients_agree(model, reference)


@pytest.mark.parametrize("seed", [0, 3, 6])
@torch.no_grad()
def test_embeddings_in_and_few_logits_out(seed: int) -> None:
    reference, model = pair(seed)
    ids = tokens(seed)
    embeds = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    close(model(inputs_embeds=embeds).logits, alone(reference, inputs_embeds=embeds))
    for keep in (1, 4, torch.tensor([0, 5, 20])):
        close(model(ids, logits_to_keep=keep).logits, alone(reference, ids, logits_to_keep=keep))


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_positions_turn_the_heads_and_reset_the_recurrence_where_they_are_zero(seed: int) -> None:
    reference, model = pair(seed)
    ids = tokens(seed)
    shifted = torch.arange(5, 26)[None]
    packed = torch.cat((torch.arange(9), torch.arange(4), torch.arange(8)))[None]
    rows = torch.cat((packed, torch.arange(21)[None]))
    for positions in (shifted, packed, rows):
        expected = alone(reference, ids, position_ids=positions.expand(2, -1))
        close(model(ids, position_ids=positions).logits, expected)


@torch.no_grad()
def test_texts_packed_in_a_row_do_not_see_each_other() -> None:
    _, model = pair(1)  # attention layers alone: a recurrent block's convolution is not reset, as in transformers
    ids = tokens(1, batch=1)
    positions = torch.cat((torch.arange(9), torch.arange(12)))[None]
    close(model(ids, position_ids=positions).logits[:, 9:], model(ids[:, 9:]).logits, 1e-5)


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_padded_rows_equal_their_single_unpadded_passes(seed: int) -> None:
    # Against rows of their own, since transformers convolves its padding and folds it in (see below).
    reference, model = pair(seed)
    ids = tokens(seed, batch=3, length=17)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 11:], mask[2, 3:8] = 0, 0, 0
    logits = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        close(logits[row, real], alone(reference, ids[row, real][None])[0], what=f"row {row}")


def edited(reference: RecurrentGemmaForCausalLM, folder: Path, **changes: object) -> LanguageModel:
    """Our model over the reference's files with another config.json."""
    reference.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return load_model(Checkpoint.open(folder))


@torch.no_grad()
def test_unscaled_embeddings(tmp_path: Path) -> None:
    # transformers has no such switch: undo its scaling beforehand.
    reference, _ = pair(4)
    ids = tokens(4)
    model = edited(reference, tmp_path, embeddings_scale_by_sqrt_dim=False)
    embeds = reference.model.embed_tokens(ids) / reference.model.normalizer
    close(model(ids).logits, alone(reference, inputs_embeds=embeds))


@torch.no_grad()
def test_a_stored_output_matrix_wins_over_a_config_that_ties_it(tmp_path: Path) -> None:
    reference, _ = pair(3)
    ids = tokens(3)
    model = edited(reference, tmp_path, tie_word_embeddings=True)
    close(model(ids).logits, alone(reference, ids))


@torch.no_grad()
def test_no_soft_cap(tmp_path: Path) -> None:
    reference, _ = pair(4)
    ids = tokens(4)
    hidden = fresh(reference).model(ids, use_cache=False).last_hidden_state
    close(edited(reference, tmp_path, logits_soft_cap=None)(ids).logits, reference.lm_head(hidden))


@torch.no_grad()
def test_transformers_still_breaks_a_continuation_of_several_tokens() -> None:
    """A record of why we do not compare with it: when this fails, it has been mended and can be compared with."""
    reference, model = pair(8)
    ids = tokens(8, batch=1)
    whole = alone(reference, ids)[:, 12:]
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
    reference, model = pair(0)
    ids = tokens(0, batch=1)
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
        return "".join(short[kind] for kind in OurConfig.parse({**SMALL, **changes}).block_types)

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
        OurConfig.parse({**SMALL, **extra, key: value})

"""Every key of a config is honoured or refused by name."""

import json
from typing import Any

import pytest
from support import SHARED, needs_shared

from lmx.core.config import ConfigReader, ModelConfig, RopeConfig
from lmx.core.errors import InputError
from lmx.core.registry import MODEL_TYPES, family_of

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OLMOE = MIXTRAL | {"model_type": "olmoe"}
DBRX: dict[str, Any] = {
    "model_type": "dbrx",
    "vocab_size": 100,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "attn_config": {"kv_n_heads": 2},
    "ffn_config": {"ffn_hidden_size": 24},
}
FALCON_MAMBA: dict[str, Any] = {
    "model_type": "falcon_mamba",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
}
RECURRENT_GEMMA = FALCON_MAMBA | {"model_type": "recurrent_gemma", "num_attention_heads": 4}
WITH_EXPERTS = {"mixtral": MIXTRAL, "olmoe": OLMOE, "dbrx": DBRX}
SMALL = WITH_EXPERTS | {"falcon_mamba": FALCON_MAMBA, "recurrent_gemma": RECURRENT_GEMMA}


def parse(config: dict[str, Any], **changes: Any) -> Any:
    config = config | changes
    return family_of(config).parse(config)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
class TestEveryFamily:
    def test_unknown_keys_are_refused(self, config: dict[str, Any]) -> None:
        for value in (1, None, "x", {}):
            with pytest.raises(InputError, match=r"config\.json: rope_flux is unknown"):
                parse(config, rope_flux=value)

    def test_harmless_keys_are_passed_over(self, config: dict[str, Any]) -> None:
        plain = parse(config)
        assert parse(config, transformers_version="4.1", use_cache=False, torch_dtype="float16", top_k=5) == plain

    def test_missing_sizes_are_named(self, config: dict[str, Any]) -> None:
        for key in config.keys() - {"model_type", "attn_config", "ffn_config"}:
            with pytest.raises(InputError, match=f"{key} is missing"):
                parse({k: v for k, v in config.items() if k != key})

    @pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, True, "8", [8], {}, float("nan")])
    def test_sizes_are_whole_and_bounded(self, config: dict[str, Any], value: object) -> None:
        for key in config.keys() - {"model_type", "attn_config", "ffn_config"}:
            with pytest.raises(InputError, match=f"{key} must be a whole number"):
                parse(config, **{key: value})

    def test_classes(self, config: dict[str, Any]) -> None:
        assert parse(config).labels == 2
        assert parse(config, id2label={"0": "a", "1": "b", "2": "c"}).labels == 3
        named = parse(config, num_labels=4, problem_type="regression", classifier_dropout=0.3)
        assert (named.labels, named.problem_type, named.classifier_dropout) == (4, "regression", 0.3)
        with pytest.raises(InputError, match="problem_type is 'guess'"):
            parse(config, problem_type="guess")

    def test_special_tokens(self, config: dict[str, Any]) -> None:
        found: ModelConfig = parse(config, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)
        assert (found.bos_ids, found.eos_ids, found.pad_id) == ((1,), (2, 3), 0)
        assert (parse(config).eos_ids, parse(config, pad_token_id=-1).pad_id) == ((), None)
        with pytest.raises(InputError, match="pad_token_id must be a whole number from 0 to 99"):
            parse(config, pad_token_id=100)
        with pytest.raises(InputError, match="eos_token_id must be a token id"):
            parse(config, eos_token_id="</s>")


@pytest.mark.parametrize("config", WITH_EXPERTS.values(), ids=WITH_EXPERTS)
class TestFamiliesWithExperts:
    def test_a_fast_or_scaled_rope_is_refused(self, config: dict[str, Any]) -> None:
        for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, {"factor": 2.0}):
            with pytest.raises(InputError, match=r"rope_scaling: (type|rope_type|factor) is"):
                parse(config, rope_scaling=scaling)
        with pytest.raises(InputError, match="rope_parameters: partial_rotary_factor"):
            parse(config, rope_parameters={"partial_rotary_factor": 0.5})
        with pytest.raises(InputError, match="rope_scaling must be an object"):
            parse(config, rope_scaling="linear")

    def test_both_spellings_of_the_rotary_base(self, config: dict[str, Any]) -> None:
        assert parse(config, rope_theta=5000.0, rope_scaling=None).rope == RopeConfig(5000.0)
        assert parse(config, rope_parameters={"rope_type": "default", "rope_theta": 5000}).rope == RopeConfig(5000.0)
        assert parse(config, rope_theta=1.0, rope_parameters={"rope_theta": 7.0}).rope == RopeConfig(7.0)

    def test_outputs_by_default(self, config: dict[str, Any]) -> None:
        assert parse(config, output_router_logits=True).output_router_logits
        assert not parse(config).output_router_logits


@pytest.mark.parametrize("config", [MIXTRAL, OLMOE], ids=["mixtral", "olmoe"])
class TestHeadsAndExperts:
    def test_experts_by_either_name(self, config: dict[str, Any]) -> None:
        for key in ("num_experts", "num_local_experts"):
            assert parse(config, **{key: 16}, num_experts_per_tok=4).experts == 16
        with pytest.raises(InputError, match="num_experts_per_tok must be a whole number from 1 to 2"):
            parse(config, num_experts=2, num_experts_per_tok=3)

    def test_heads_must_fit(self, config: dict[str, Any]) -> None:
        assert parse(config).kv_heads == 4
        with pytest.raises(InputError, match=r"num_key_value_heads \(3\) does not divide 4"):
            parse(config, num_key_value_heads=3)
        with pytest.raises(InputError, match=r"head_dim \(5\) must be even"):
            parse(config, head_dim=5)
        with pytest.raises(InputError, match="head_dim"):
            parse(config, num_attention_heads=33)

    def test_activation(self, config: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="hidden_act is 'xielu'; supported: silu"):
            parse(config, hidden_act="xielu")


def test_windows() -> None:
    assert parse(MIXTRAL, sliding_window=7).sliding_window == 7
    assert parse(OLMOE, sliding_window=None).head_dim == 8
    with pytest.raises(InputError, match="sliding_window is 7, which lmx does not support"):
        parse(OLMOE, sliding_window=7)


def test_olmoe_defaults() -> None:
    config = parse(OLMOE)
    assert (config.rms_norm_eps, config.norm_topk_prob, config.clip_qkv) == (1e-5, False, None)
    assert (config.experts, config.experts_per_token, config.rope.theta) == (64, 8, 10_000)
    assert parse(OLMOE, clip_qkv=8).clip_qkv == 8.0
    with pytest.raises(InputError, match="clip_qkv must be a number"):
        parse(OLMOE, clip_qkv="8")


def nested(section: str, **values: object) -> dict[str, Any]:
    return DBRX | {section: DBRX[section] | values}


def test_dbrx_rotary_base() -> None:
    """A top-level base wins; attn_config's, which transformers 5 drops, comes next."""
    assert parse(DBRX).rope.theta == 10_000
    config = nested("attn_config", rope_theta=500_000)
    assert parse(config).rope.theta == 500_000
    assert parse(config, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope.theta == 7.0
    assert parse(config, rope_parameters=None).rope.theta == 500_000


@pytest.mark.parametrize(("given", "norm"), [(1, 1.0), (1.0, 1.0), (2, 2.0), (None, None)])
def test_dbrx_norm_of_the_experts_weights(given: float | None, norm: float | None) -> None:
    assert parse(nested("ffn_config", moe_normalize_expert_weights=given)).ffn.normalize == norm
    assert parse(DBRX).ffn.normalize == 1.0


def test_dbrx_nested_sections() -> None:
    assert parse(nested("attn_config", clip_qkv=None)).attention.clip_qkv is None
    assert parse(nested("attn_config", tie_word_embeddings=True, max_length=20)) == parse(DBRX)
    assert parse(nested("ffn_config", hidden_size=999, id2label={}, moe_jitter_eps=None)) == parse(DBRX)
    assert parse(nested("ffn_config", ffn_act_fn={"name": "gelu"})).ffn.activation == "gelu"
    for config, named in (
        (nested("attn_config", alibi=True), "attn_config: alibi is unknown"),
        (nested("ffn_config", mlp_type="dense"), "ffn_config: mlp_type is unknown"),
        (nested("ffn_config", uniform_expert_assignment=True), "ffn_config: uniform_expert_assignment is True"),
        (nested("ffn_config", ffn_act_fn={"name": "silu", "beta": 2}), "ffn_act_fn: beta is unknown"),
        (nested("attn_config", kv_n_heads=3), "does not divide"),
        (DBRX | {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (DBRX | {"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        (DBRX | {"attn_config": [1]}, "attn_config must be an object"),
    ):
        with pytest.raises(InputError, match=named):
            parse(config)


@needs_shared
def test_published_dbrx() -> None:
    config = parse(json.loads((SHARED / "data" / "dbrx" / "config.json").read_text()))
    assert (config.rope.theta, config.attention.clip_qkv, config.ffn.normalize) == (500_000, 8.0, 1.0)
    assert (config.context_length, config.router_aux_loss_coef, config.eos_ids) == (32768, 0.05, ())


def test_reader_bounds() -> None:
    read = ConfigReader({"a": 5.0, "b": 0.5, "names": ["x"], "bad": [1], "flag": 1})
    assert read.integer("a") == 5
    assert read.optional_integer("absent") is None
    assert read.optional_number("b") == 0.5
    assert read.names("names") == ("x",)
    for call, named in (
        (lambda: read.integer("a", most=4), "a must be a whole number from 1 to 4"),
        (lambda: read.number("b", least=0.6), "b must be a number from 0.6"),
        (lambda: read.names("bad"), "bad must be a list of names"),
        (lambda: read.flag("flag", False), "flag must be true or false"),
    ):
        with pytest.raises(InputError, match=named):
            call()


@pytest.mark.parametrize("model_type", [None, 5, "llama", "../mixtral", "core.models.mixtral"])
def test_other_architectures(model_type: object) -> None:
    with pytest.raises(InputError, match=r"model_type .* is not supported"):
        family_of({"model_type": model_type})


def test_registry_names_its_families() -> None:
    assert set(SMALL) == set(MODEL_TYPES)
    for model_type in SMALL:
        assert family_of({"model_type": model_type}).model_type == model_type

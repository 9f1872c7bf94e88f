import pytest
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from lmx.core.errors import InputError
from lmx.quant.spec import QuantSpec

SPECS = [QuantSpec("nf4"), QuantSpec("nf4", double_quant=True), QuantSpec("fp4"), QuantSpec("int8")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_transformers_reads_our_config(spec):
    config = spec.to_config(["lm_head", "model.embed"], "bfloat16")
    read = BitsAndBytesConfig.from_dict(config)
    method = {"int8": "llm_int8"}.get(spec.scheme, spec.scheme)
    assert read.quantization_method() == method
    assert read.bnb_4bit_use_double_quant == spec.double_quant
    assert read.llm_int8_skip_modules == ["lm_head", "model.embed"]
    # What it would write itself holds what we wrote, but for its private doubles.
    assert config.items() <= read.to_dict().items()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_config_of_transformers_is_read_back(spec):
    theirs = BitsAndBytesConfig(
        load_in_4bit=spec.scheme != "int8",
        load_in_8bit=spec.scheme == "int8",
        bnb_4bit_quant_type=spec.four_bit_type or "fp4",
        bnb_4bit_use_double_quant=spec.double_quant,
    ).to_dict()
    theirs["quant_method"] = theirs["quant_method"].value
    assert QuantSpec.from_config(theirs) == spec
    only_private = {key: value for key, value in theirs.items() if key not in ("load_in_4bit", "load_in_8bit")}
    assert QuantSpec.from_config(only_private) == spec


def test_names_that_were_kept_come_back_as_names_to_skip():
    config = QuantSpec("nf4").to_config(["lm_head"], "float16")
    assert QuantSpec.from_config(config) == QuantSpec("nf4", skip=("lm_head",))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"load_in_4bit": False}, "not exactly one"),
        ({"load_in_8bit": True}, "not exactly one"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "af4"}, "af4"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "nf4"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ({"llm_int8_skip_modules": [1]}, "llm_int8_skip_modules"),
        ({"bnb_4bit_use_double_quant": 1}, "bnb_4bit_use_double_quant"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change, match):
    with pytest.raises(InputError, match=match):
        QuantSpec.from_config(QuantSpec("nf4").to_config([], "bfloat16") | change)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="int4"):
        QuantSpec("int4")
    with pytest.raises(InputError, match="block size of 100"):
        QuantSpec("nf4", block_size=100)
    with pytest.raises(InputError, match="int8 has neither"):
        QuantSpec("int8", double_quant=True)
    with pytest.raises(InputError, match="int8 has neither"):
        QuantSpec("int8", block_size=128)


@pytest.mark.parametrize(
    ("pattern", "module", "skipped"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("layers.1", "layers.1.attn.q_proj", True),
        ("layers.1", "layers.11.attn.q_proj", False),
        ("mlp.gate", "layers.0.mlp.gate", True),
        ("mlp.gate", "layers.0.mlp.gate_proj", False),
        ("*.experts.*.w2", "model.layers.3.block_sparse_moe.experts.7.w2", True),
        ("*.experts.*.w2", "model.layers.3.block_sparse_moe.experts.7.w1", False),
        ("model.layers.[0-3].*", "model.layers.2.self_attn.q_proj", True),
        ("model.layers.[0-3].*", "model.layers.4.self_attn.q_proj", False),
    ],
)
def test_skip_patterns(pattern, module, skipped):
    assert QuantSpec(skip=(pattern,)).skips(module) == skipped
    if "*" not in pattern:  # a plain name means the same to transformers
        assert should_convert_module(module, [pattern]) != skipped

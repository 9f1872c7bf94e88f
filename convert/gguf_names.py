"""What a GGUF calls the tensors of the four families that llama.cpp runs, and what it does to their numbers.

A table a family: GGUF's name, the hub's, and what changes in between. `{}` stands for the layer; the hub's second `{}`
for the expert, where GGUF keeps all experts of a layer in one tensor [experts, out, in].
Sources: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py and the `conversion` folder there.
Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.names import split_numbers


class Change(Enum):
    """What stands in a GGUF in place of the hub's numbers.

    QUERY_PAIRS, KEY_PAIRS: rows of each head reordered, so that the two channels that turn together are neighbours.
    DECAY: A = -exp(A_log). CONVOLUTION: [inner, width] instead of [inner, 1, width]. EXPERTS: all of a layer in one.
    """

    NOTHING = "nothing"
    QUERY_PAIRS = "query pairs"
    KEY_PAIRS = "key pairs"
    DECAY = "decay"
    CONVOLUTION = "convolution"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a table. exact: llama.cpp computes with this tensor in float32 only."""

    gguf: str
    hub: str
    change: Change = Change.NOTHING
    exact: bool = False


_MISMATCH = "it was made by another version of the converter, or for another model: lmx does not guess at a model"


@dataclass(frozen=True, slots=True)
class Match:
    """A tensor of the file that a rule knows; `indices`: its layer, and in old files its expert."""

    rule: Rule
    indices: tuple[int, ...]

    @property
    def change(self) -> Change:
        """What to undo; an expert that stands alone needs nothing."""
        alone = self.rule.change is Change.EXPERTS and len(self.indices) == 2
        return Change.NOTHING if alone else self.rule.change

    def hub(self, *more: int) -> str:
        """The hub's name."""
        return self.rule.hub.format(*self.indices, *more)


class TensorTable:
    """The rules of one architecture, looked up by a GGUF's names."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self._by_gguf = {rule.gguf: rule for rule in rules}
        # Mixtral's first GGUFs kept each expert by itself: blk.0.ffn_gate.3.weight
        old = {rule.gguf.replace("_exps.", ".{}."): rule for rule in rules if rule.change is Change.EXPERTS}
        self._by_gguf |= old

    def match(self, name: str) -> Match:
        """The rule for a tensor of the file. Raises InputError for a name that is not in the table."""
        skeleton, indices = split_numbers(name)
        rule = self._by_gguf.get(skeleton)
        if rule is None:
            raise InputError(f"{quoted(name)}: unknown tensor", _MISMATCH)
        return Match(rule, indices)

    def expand(self, layers: int) -> Iterator[tuple[Rule, tuple[int, ...]]]:
        """Every rule with every layer, in the order of a file."""
        for rule in self.rules:
            if "{}" not in rule.gguf:
                yield rule, ()
        for layer in range(layers):
            yield from ((rule, (layer,)) for rule in self.rules if "{}" in rule.gguf)


def _attention(layer: str, *, pairs: bool) -> tuple[Rule, ...]:
    changes = {"q": Change.QUERY_PAIRS, "k": Change.KEY_PAIRS} if pairs else {}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    return tuple(
        Rule(f"blk.{{}}.{gguf}.weight", f"{layer}self_attn.{n}_proj.weight", changes.get(n, Change.NOTHING))
        for n, gguf in names.items()
    )


def _experts(gate: str, up: str, down: str) -> tuple[Rule, ...]:
    names = {"gate": gate, "up": up, "down": down}
    return tuple(Rule(f"blk.{{}}.ffn_{n}_exps.weight", hub, Change.EXPERTS) for n, hub in names.items())


_LAYER = "model.layers.{}."
_ENDS = (
    Rule("token_embd.weight", "model.embed_tokens.weight"),
    Rule("output_norm.weight", "model.norm.weight", exact=True),
    Rule("output.weight", "lm_head.weight"),
)
_NORMS = (
    Rule("blk.{}.attn_norm.weight", _LAYER + "input_layernorm.weight", exact=True),
    Rule("blk.{}.ffn_norm.weight", _LAYER + "post_attention_layernorm.weight", exact=True),
)

MIXTRAL = TensorTable(
    *_ENDS,
    *_NORMS,
    *_attention(_LAYER, pairs=True),
    Rule("blk.{}.ffn_gate_inp.weight", _LAYER + "block_sparse_moe.gate.weight", exact=True),
    *_experts(*(f"{_LAYER}block_sparse_moe.experts.{{}}.{n}.weight" for n in ("w1", "w3", "w2"))),
)

OLMOE = TensorTable(
    *_ENDS,
    *_NORMS,
    *_attention(_LAYER, pairs=False),
    Rule("blk.{}.attn_q_norm.weight", _LAYER + "self_attn.q_norm.weight", exact=True),
    Rule("blk.{}.attn_k_norm.weight", _LAYER + "self_attn.k_norm.weight", exact=True),
    Rule("blk.{}.ffn_gate_inp.weight", _LAYER + "mlp.gate.weight", exact=True),
    *_experts(*(f"{_LAYER}mlp.experts.{{}}.{n}_proj.weight" for n in ("gate", "up", "down"))),
)

_BLOCK = "transformer.blocks.{}."
DBRX = TensorTable(
    Rule("token_embd.weight", "transformer.wte.weight"),
    Rule("output_norm.weight", "transformer.norm_f.weight", exact=True),
    Rule("output.weight", "lm_head.weight"),
    Rule("blk.{}.attn_norm.weight", _BLOCK + "norm_attn_norm.norm_1.weight", exact=True),
    Rule("blk.{}.attn_qkv.weight", _BLOCK + "norm_attn_norm.attn.Wqkv.weight"),
    Rule("blk.{}.attn_output.weight", _BLOCK + "norm_attn_norm.attn.out_proj.weight"),
    Rule("blk.{}.attn_output_norm.weight", _BLOCK + "norm_attn_norm.norm_2.weight", exact=True),
    Rule("blk.{}.ffn_gate_inp.weight", _BLOCK + "ffn.router.layer.weight", exact=True),
    *_experts(*(f"{_BLOCK}ffn.experts.mlp.{{}}.{n}.weight" for n in ("w1", "v1", "w2"))),
)

_MAMBA = "backbone.layers.{}."
FALCON_MAMBA = TensorTable(
    Rule("token_embd.weight", "backbone.embeddings.weight"),
    Rule("output_norm.weight", "backbone.norm_f.weight", exact=True),
    Rule("output.weight", "lm_head.weight"),
    Rule("blk.{}.attn_norm.weight", _MAMBA + "norm.weight", exact=True),
    Rule("blk.{}.ssm_in.weight", _MAMBA + "mixer.in_proj.weight"),
    Rule("blk.{}.ssm_conv1d.weight", _MAMBA + "mixer.conv1d.weight", Change.CONVOLUTION, exact=True),
    Rule("blk.{}.ssm_conv1d.bias", _MAMBA + "mixer.conv1d.bias", exact=True),
    Rule("blk.{}.ssm_x.weight", _MAMBA + "mixer.x_proj.weight"),
    Rule("blk.{}.ssm_dt.weight", _MAMBA + "mixer.dt_proj.weight", exact=True),
    Rule("blk.{}.ssm_dt.bias", _MAMBA + "mixer.dt_proj.bias", exact=True),
    Rule("blk.{}.ssm_a", _MAMBA + "mixer.A_log", Change.DECAY, exact=True),
    Rule("blk.{}.ssm_d", _MAMBA + "mixer.D", exact=True),
    Rule("blk.{}.ssm_out.weight", _MAMBA + "mixer.out_proj.weight"),
)

"""What Mistral calls the tensors of a Mixtral in `consolidated.*`, in both of its layouts. Imports no torch.

The first release stacked the experts of a layer along the rows, the third matrix transposed; mistral_inference since
1.0 has each by itself. Rotary channels are neighbours in both.
Source: https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/transformer.py.
"""

from lmx.convert.original_names import Change, Row, Table

_LAYER, _OURS = "layers.{}.", "model.layers.{}."
_MATRICES = ("w1", "w2", "w3")


def mistral_table(heads: int, kv_heads: int, experts: int) -> Table:
    """The tensors of both layouts. heads, kv_heads: of an attention layer; experts: of a layer."""
    return Table(*_common_rows(heads, kv_heads), *_single_rows(), *_stacked_rows(experts))


def written_table(heads: int, kv_heads: int) -> Table:
    """The tensors of the present layout alone, which has one row for each of the hub's."""
    return Table(*_common_rows(heads, kv_heads), *_single_rows())


def _common_rows(heads: int, kv_heads: int) -> tuple[Row, ...]:
    attention, theirs = _OURS + "self_attn.", _LAYER + "attention."
    return (
        Row("tok_embeddings.weight", ("model.embed_tokens.weight",)),
        Row("norm.weight", ("model.norm.weight",)),
        Row("output.weight", ("lm_head.weight",)),
        Row(_LAYER + "attention_norm.weight", (_OURS + "input_layernorm.weight",)),
        Row(_LAYER + "ffn_norm.weight", (_OURS + "post_attention_layernorm.weight",)),
        Row(theirs + "wq.weight", (attention + "q_proj.weight",), Change.PAIRS, heads),
        Row(theirs + "wk.weight", (attention + "k_proj.weight",), Change.PAIRS, kv_heads),
        Row(theirs + "wv.weight", (attention + "v_proj.weight",)),
        Row(theirs + "wo.weight", (attention + "o_proj.weight",)),
    )


def _single_rows() -> tuple[Row, ...]:
    theirs, ours = _LAYER + "feed_forward.", _OURS + "block_sparse_moe."
    experts = (Row(f"{theirs}experts.{{}}.{name}.weight", (f"{ours}experts.{{}}.{name}.weight",)) for name in _MATRICES)
    return Row(theirs + "gate.weight", (ours + "gate.weight",)), *experts


def _stacked_rows(experts: int) -> tuple[Row, ...]:
    theirs, ours = _LAYER + "block_sparse_moe.", _OURS + "block_sparse_moe."
    stacked = (
        Row(
            theirs + name,
            tuple(f"{ours}experts.{expert}.{name}.weight" for expert in range(experts)),
            Change.TRANSPOSED if name == "w2" else Change.NOTHING,
        )
        for name in _MATRICES
    )
    return Row(theirs + "gate.weight", (ours + "gate.weight",)), *stacked

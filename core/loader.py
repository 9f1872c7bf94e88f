"""From a checkpoint to a running model: built on the meta device, then every weight assigned, strictly.

On the CPU, a weight whose dtype is already right stays a view of the mapped file: loading costs headers, and memory
what is touched.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lmx.core.checkpoint import Source
from lmx.core.errors import InputError
from lmx.core.heads import HeadKind
from lmx.core.mapped import ITEM_SIZES, Advice
from lmx.core.model import LanguageModel
from lmx.core.names import NameTable, Piece, Shape
from lmx.core.placement import HOST, Budget, Destinations, move_weight
from lmx.core.registry import Family, family_of

HEAD_NAMES = {"head.weight": "lm_head.weight", "head.score.weight": "score.weight", "head.score.bias": "score.bias"}
DECODER_PREFIX = "decoder."


def build(config: Mapping[str, object], head: HeadKind = "causal", *, tied: bool | None = None) -> LanguageModel:
    """A model with the config's shapes on torch's current default device, its weights not set.

    Under `torch.device("meta")` it costs no memory. `reset_parameters()` makes it ready for training.
    Raises InputError for an architecture or a key that we do not support.
    """
    family = family_of(config)
    return LanguageModel(family.decoder(family.parse(config)), head, tied=tied)


def hub_shapes(model: LanguageModel, family: Family) -> dict[str, Shape]:
    """Names and shapes of every tensor that a checkpoint of this model has on the hub."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = {HEAD_NAMES[name]: shapes.pop(name) for name in list(shapes) if name in HEAD_NAMES}
    table = family.names(model.config)
    return table.hub_shapes({name.removeprefix(DECODER_PREFIX): shape for name, shape in shapes.items()}) | heads


def load_model(
    source: Source,
    *,
    head: HeadKind = "causal",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    budgets: Sequence[Budget] = (),
) -> LanguageModel:
    """Load a checkpoint.

    head: what to put on the decoder; a classification head that the checkpoint lacks begins from random weights.
    dtype: convert all weights; None keeps each as stored. device: None is the CPU. budgets: what may be taken of each
    card, in place of a device; what they do not hold stays on the CPU. The model is in evaluation mode.
    Raises InputError where config, names or shapes do not fit.
    """
    model, bound = build_bound(source.config, {name: info.shape for name, info in source.infos.items()}, head)
    weights = held_bytes(model, source, bound, dtype) if budgets else {}
    places = Destinations.plan(model, weights, dtype or torch.float32, device, budgets)
    for name, piece in bound.items():
        assign_moved(model, name, source, piece, piece.of(source.tensor(piece.hub)), dtype, places)
    start_missing_head(model, dtype, places.placement.head)
    places.settle()
    return model.eval()


def held_bytes(
    model: LanguageModel, source: Source, bound: Mapping[str, Piece], dtype: torch.dtype | None
) -> dict[str, int]:
    """The bytes of each parameter in `dtype`, or as stored; what the checkpoint lacks, a new head, is small."""
    names = dict(model.named_parameters())
    return {
        name: names[name].numel() * (dtype.itemsize if dtype else ITEM_SIZES[source.infos[piece.hub].dtype])
        for name, piece in bound.items()
        if piece.hub in source.infos
    }


def assign_moved(
    model: LanguageModel,
    name: str,
    source: Source,
    piece: Piece,
    weight: Tensor,
    dtype: torch.dtype | None,
    places: Destinations,
) -> None:
    """Put a weight of the source in its place on its device; on a card, the pages that it was read from are let go."""
    device = places.of(name)
    assign(model, name, move_weight(weight, device, dtype or weight.dtype))
    if device != HOST and piece.rows is None:  # else its neighbours in the same tensor may come next
        source.advise(piece.hub, Advice.DONT_NEED)


def build_bound(
    config: Mapping[str, object], stored: Mapping[str, Shape], head: HeadKind
) -> tuple[LanguageModel, dict[str, Piece]]:
    """A model without weights, on the meta device, and where in the file each of them lies.

    stored: names and shapes in the file. Raises InputError for what does not fit.
    """
    # A tied model may still bring an output matrix of its own; then that one counts.
    tied = None if "lm_head.weight" not in stored else False
    with torch.device("meta"):
        model = build(config, head, tied=tied)
    return model, bind(model, family_of(config).names(model.config), stored)


def bind(model: LanguageModel, table: NameTable, stored: Mapping[str, Shape]) -> dict[str, Piece]:
    """Where in the file each of the model's weights lies. Raises InputError for what does not fit."""
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = {name: wanted.pop(name) for name in list(wanted) if name in HEAD_NAMES}
    body = {name: shape for name, shape in stored.items() if name not in HEAD_NAMES.values()}
    prefix = table.base_prefix
    if prefix and not any(name.startswith(prefix) for name in body):
        # A model saved without its head lacks the prefix that the head's class puts before the decoder.
        bound = table.bind(
            {prefix + name: shape for name, shape in body.items()},
            {n.removeprefix(DECODER_PREFIX): s for n, s in wanted.items()},
        )
        bound = {name: piece.renamed(piece.hub.removeprefix(prefix)) for name, piece in bound.items()}
    else:
        bound = table.bind(body, {n.removeprefix(DECODER_PREFIX): s for n, s in wanted.items()})
    found = {DECODER_PREFIX + name: piece for name, piece in bound.items()}
    for name, shape in heads.items():
        hub = HEAD_NAMES[name]
        if hub in stored:
            if stored[hub] != shape:
                raise InputError(
                    f"{hub}: shape {list(stored[hub])} where config.json asks for {list(shape)}",
                    "Weights and config.json belong to different models.",
                )
            found[name] = Piece(hub, shape)
        elif model.kind == "causal":
            raise InputError(
                f"the checkpoint lacks {hub}, and config.json does not tie it to the embedding",
                "Load the decoder alone with head='none', or pull the model again.",
            )
    return found


def stored_head(config: Mapping[str, object], stored: Collection[str]) -> HeadKind:
    """Which head a file with these tensors brings. Raises InputError for an architecture that is not supported."""
    if "score.weight" in stored:
        return "token" if "score.bias" in stored else "sequence"
    tied = family_of(config).parse(config).tie_word_embeddings
    return "causal" if tied or "lm_head.weight" in stored else "none"


def assign(model: nn.Module, name: str, weight: Tensor) -> None:
    """Put a weight in the place of the meta one."""
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).register_parameter(last, nn.Parameter(weight, weight.is_floating_point()))


def start_missing_head(model: LanguageModel, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give random weights to a classification head that the checkpoint lacks."""
    if model.head is None or not any(weight.is_meta for weight in model.head.parameters()):
        return
    model.head.to_empty(device=device)
    model.head.to(dtype or model.decoder.embed.weight.dtype)
    model.head.reset_parameters(model.config.initializer_range)

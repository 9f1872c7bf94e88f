"""How well a model predicts texts, and how far it is from another one.

Every sequence goes through in pieces that a state connects, so memory is bounded by a piece's logits, whatever the
length of a sequence; a comparison runs both models in turn over each piece. Sums are kept in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.layers.moe import route
from lmx.core.model import AnyState, LanguageModel
from lmx.core.recurrent_state import RecurrentState

# Tokens of a piece: enough to keep matrix products busy, and fewer where a vocabulary is large.
_PIECE = 512
_PIECE_LOGITS = 1 << 26
# Logits that are worked on in float64 at a time.
_SLICE_LOGITS = 1 << 20

_NOT_FINITE = "load it with --dtype fp32; if it persists the weights are damaged: download them again"


@dataclass(frozen=True)
class Progress:
    """How far an evaluation has come: tokens read, tokens in all, and the mean loss so far in nats."""

    tokens: int
    total: int
    nll: float


@dataclass(frozen=True)
class Evaluation:
    """The result over all sequences.

    nll: mean nats a predicted token; perplexity: e to that; tokens: how many were predicted. Against another model:
    kl_divergence: KL(BASE || MODEL), mean nats a token; top1_agreement: the share of positions where both find the same
    token likeliest; routing_agreement: the share of token-layers where both choose the same set of experts;
    state_drift: the distance of the recurrent states from BASE's at the end of a sequence, relative to their norm, mean
    over the sequences. None: not asked for, or the family has no such thing.
    """

    perplexity: float
    nll: float
    tokens: int
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    routing_agreement: float | None = None
    state_drift: float | None = None


def windows(ids: Sequence[int], context: int, bos: int | None) -> list[list[int]]:
    """Cut a text into windows of at most `context` tokens, each with `bos` first if there is one; none overlap.

    A last window with nothing to predict is left out. Raises InputError where the text is too short for any.
    """
    room = context - (bos is not None)
    start = [] if bos is None else [bos]
    cut = [start + list(ids[i : i + room]) for i in range(0, len(ids), room)] if room > 0 else []
    found = [window for window in cut if len(window) > 1]
    if not found:
        raise InputError(f"{len(ids)} tokens in windows of {context} leave nothing to predict", "give a longer text")
    return found


def evaluate(
    model: LanguageModel, sequences: Sequence[Sequence[int]], base: LanguageModel | None = None
) -> Iterator[Progress | Evaluation]:
    """Score every token of each sequence but its first; yields `Progress` after each piece, an `Evaluation` at the end.

    base: another model of the same vocabulary to compare with. A sequence is scored as given: nothing is put before it.
    Raises InputError for a sequence that is too short, too long or holds ids beyond the vocabulary, for models that
    cannot be compared, and for logits that are not finite.
    """
    _check(sequences, model)
    if base is not None:
        _check_comparable(model, base)
    total, tally = sum(len(ids) for ids in sequences), _Tally()
    read = 0
    for ids in sequences:
        for count in _score(model, base, ids, tally):
            read += count
            yield Progress(read, total, tally.nll / max(tally.tokens, 1))
    yield tally.result(compared=base is not None)


@dataclass
class _Tally:
    """Sums over all tokens so far, in Python's float64."""

    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    same_top: int = 0
    routed: int = 0
    same_experts: int = 0
    drifts: list[float] = field(default_factory=list)

    def result(self, *, compared: bool) -> Evaluation:
        """The means."""
        nll = self.nll / self.tokens
        perplexity = math.exp(nll) if nll < 700 else math.inf
        if not compared:
            return Evaluation(perplexity, nll, self.tokens)
        return Evaluation(
            perplexity,
            nll,
            self.tokens,
            self.divergence / self.tokens,
            self.same_top / self.tokens,
            self.same_experts / self.routed if self.routed else None,
            math.fsum(self.drifts) / len(self.drifts) if self.drifts else None,
        )


@torch.no_grad()
def _score(model: LanguageModel, base: LanguageModel | None, ids: Sequence[int], tally: _Tally) -> Iterator[int]:
    """Score one sequence; yields the tokens of each piece."""
    state, base_state = model.make_state(1), None if base is None else base.make_state(1)
    step = max(1, min(_PIECE, _PIECE_LOGITS // model.config.vocab_size))
    for start in range(0, len(ids), step):
        piece = torch.tensor([ids[start : start + step]])
        # The last token predicts nothing; the first of the next piece is what the last of this one predicts.
        targets = torch.tensor(ids[start + 1 : start + 1 + piece.shape[1]])
        logits, experts = _run(model, piece, state)
        base_logits, base_experts = (None, []) if base is None else _run(base, piece, base_state)
        _add(tally, logits, base_logits, targets)
        for ours, theirs in zip(experts, base_experts, strict=base is not None):
            tally.routed += len(ours)
            tally.same_experts += int((ours == theirs.to(ours.device)).all(-1).sum())
        yield piece.shape[1]
    if base_state is not None:
        drift = _drift(state, base_state)
        tally.drifts += [] if drift is None else [drift]


def _run(model: LanguageModel, piece: Tensor, state: AnyState | None) -> tuple[Tensor, list[Tensor]]:
    """Logits [length, vocab], and for each layer of experts the sorted ids of those chosen, [length, top_k]."""
    output = model(piece.to(model.device), state=state, output_router_logits=True)
    chosen = [route(logits, model.config.experts_to_choose, None)[0] for logits in output.router_logits or ()]
    return output.logits[0], [ids.sort(-1).values for ids in chosen]


def _add(tally: _Tally, logits: Tensor, base_logits: Tensor | None, targets: Tensor) -> None:
    """Count the predictions of `targets` [predicted] by the first so many rows of logits [length, vocab]."""
    rows = max(1, _SLICE_LOGITS // logits.shape[-1])
    for start in range(0, len(targets), rows):
        wanted = targets[start : start + rows].to(logits.device)
        log_q = logits[start : start + len(wanted)].double().log_softmax(-1)
        nll = -log_q.gather(1, wanted[:, None]).sum().item()
        if math.isnan(nll):
            raise InputError("the model's logits are not finite", _NOT_FINITE)
        tally.tokens += len(wanted)
        tally.nll += nll
        if base_logits is not None:
            # sum of p log(p / q): a log-softmax of finite logits is finite, so no term is 0 times infinity
            log_p = base_logits[start : start + len(wanted)].to(logits.device).double().log_softmax(-1)
            tally.divergence += (log_p.exp() * (log_p - log_q)).sum().item()
            tally.same_top += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def _drift(state: AnyState, base: AnyState) -> float | None:
    """The distance of all recurrent layers' hidden states from the base's, by the norm of those; None without any."""
    difference = norm = 0.0
    for ours, theirs in zip(state.layers, base.layers, strict=True):
        if isinstance(ours, RecurrentState) and isinstance(theirs, RecurrentState):
            reference = theirs.hidden.double()
            difference += (ours.hidden.to(reference.device).double() - reference).square().sum().item()
            norm += reference.square().sum().item()
    return math.sqrt(difference / norm) if norm else None


def _check(sequences: Sequence[Sequence[int]], model: LanguageModel) -> None:
    if model.kind != "causal":
        raise InputError(f"a model with head={model.kind!r} predicts no tokens", "load it with head='causal'")
    if not sequences:
        raise InputError("there is nothing to evaluate", "give a text or sequences of token ids")
    limit, vocabulary = model.context_length, model.config.vocab_size
    for number, ids in enumerate(sequences, 1):
        if len(ids) < 2:
            raise InputError(f"sequence {number} has {len(ids)} tokens: nothing to predict", "give 2 or more")
        if limit is not None and len(ids) > limit:
            raise InputError(f"sequence {number} has {len(ids):,} tokens, the context {limit:,}", "give shorter ones")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InputError(f"sequence {number} holds ids beyond the {vocabulary:,} tokens", "use its own tokenizer")


def _check_comparable(model: LanguageModel, base: LanguageModel) -> None:
    if (model.family, model.config.vocab_size) != (base.family, base.config.vocab_size) or base.kind != model.kind:
        raise InputError(
            f"{model.family} of {model.config.vocab_size} tokens and {base.family} of {base.config.vocab_size} "
            "cannot be compared",
            "compare a model with the one it was made from",
        )
    if model.config.layers != base.config.layers:
        raise InputError(f"models of {model.config.layers} and {base.config.layers} layers differ", "compare like ones")

"""Mixture of experts: the router's choice, the bank of experts, and the load balancing loss."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.gpu import stream as gpu
from lmx.core.gpu.launch import can_launch
from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.native.matrix import answer_many, has_panels
from lmx.core.native.router import can_route, route_natively
from lmx.core.native.vector import Expert, ExpertTable, StoredMatrix, are_few, can_describe, can_multiply, can_take

if TYPE_CHECKING:
    from lmx.core.gpu.experts import DeviceBank


def route(router_logits: Tensor, top_k: int, normalize: float | None) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them: softmax over all experts, the `top_k` largest, divided by their p-norm.

    router_logits: [tokens, experts]; normalize: the p of the norm, or None to leave the probabilities as they are.
    Returns the experts' ids [tokens, top_k] and their weights [tokens, top_k] in float32.
    """
    if can_route(router_logits, normalize):
        return route_natively(router_logits, top_k, normalize)
    if gpu.can_route(router_logits, normalize):
        return gpu.route(router_logits, top_k, normalize)
    probabilities = F.softmax(router_logits.float(), dim=-1)
    weights, ids = torch.topk(probabilities, top_k, dim=-1)
    if normalize is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=normalize, dim=-1, keepdim=True)
    return ids, weights


def jitter(x: Tensor, noise: float, training: bool) -> Tensor:
    """Multiply by uniform noise from [1 - noise, 1 + noise], in training only."""
    if not training or not noise:
        return x
    return x * torch.empty_like(x).uniform_(1.0 - noise, 1.0 + noise)


def balance_loss(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None) -> Tensor:
    """The load balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), over all layers at once.

    router_logits: one [tokens, experts] a layer; mask: [batch, length] with 0 for padding, or None.
    """
    experts = router_logits[0].shape[-1]
    counts = torch.zeros(experts, device=router_logits[0].device)
    probability = torch.zeros(experts, device=router_logits[0].device)
    rows = torch.zeros((), device=router_logits[0].device)
    for logits in router_logits:
        probabilities = F.softmax(logits.to(counts.device), dim=-1)
        ids = torch.topk(probabilities, top_k, dim=-1).indices
        real = torch.ones(len(ids), device=ids.device) if mask is None else mask.reshape(-1).to(ids.device).float()
        counts = counts.index_add(0, ids.flatten(), real.repeat_interleave(top_k))
        probability = probability + (probabilities.float() * real[:, None]).sum(0)
        rows = rows + real.sum()
    return experts * torch.sum(counts / rows * (probability / rows))


def run_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """Send each token through its experts and add up their answers by weight.

    Tokens are sorted by expert, so that each expert that was hit reads its weights once, and none that was not.
    Experts answer in the order of their numbers, for one token as for many: a prompt and a decode step add alike.

    x: [tokens, hidden]; ids, weights: [tokens, top_k]; gate, up: [inner, hidden] an expert; down: [hidden, inner].
    """
    act = ACTIVATIONS[activation]
    top_k = ids.shape[-1]
    out = torch.zeros_like(x)
    order = ids.flatten().argsort(stable=True)  # [tokens * top_k], by expert
    counts = torch.bincount(ids.flatten(), minlength=len(gate)).tolist()
    flat_weights = weights.flatten()
    for expert, slots in enumerate(order.split(counts)):
        if not len(slots):
            continue
        tokens = slots // top_k
        inputs = x[tokens]  # [tokens of this expert, hidden]
        inner = act(F.linear(inputs, gate[expert])) * F.linear(inputs, up[expert])
        answer = F.linear(inner, down[expert]) * flat_weights[slots, None]
        out.index_add_(0, tokens, answer.to(out.dtype))
    return out


def run_experts_once(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """`run_experts` for a single token, the step of every generated token: no sorting, no gathering. x: [1, hidden]."""
    act = ACTIVATIONS[activation]
    out = torch.zeros_like(x)
    for expert, slot in sorted((expert, slot) for slot, expert in enumerate(ids[0].tolist())):
        inner = act(F.linear(x, gate[expert])) * F.linear(x, up[expert])
        out += (F.linear(inner, down[expert]) * weights[0, slot]).to(out.dtype)
    return out


@torch.library.custom_op("lmx::experts", mutates_args=())
def _experts_op(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    activation: str,
) -> Tensor:
    return run_experts(x, ids, weights, gate, up, down, activation)


@_experts_op.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    activation: str,
) -> Tensor:
    return torch.empty_like(x)


class Bank(nn.Module):
    """All experts of one layer, however they are stored.

    forward: x [tokens, hidden], ids and weights [tokens, top_k] -> [tokens, hidden].
    """

    @property
    @abstractmethod
    def capturable(self) -> bool:
        """Whether a step can be captured in a CUDA graph: the ids of the chosen experts never leave the device."""

    @property
    @abstractmethod
    def table(self) -> ExpertTable | None:
        """The matrices as the CPU's kernels read them; None where they cannot."""


class ExpertBank(Bank):
    """All experts of one layer: gated MLPs, `down(act(gate(x)) * up(x))`.

    Each expert's matrices are parameters of their own, so that they can be views of a mapped file in whatever order
    that file holds them.

    forward: x [tokens, hidden], ids and weights [tokens, top_k] -> [tokens, hidden].
    """

    def __init__(self, experts: int, hidden: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.ParameterList(torch.empty(inner, hidden) for _ in range(experts))
        self.up = nn.ParameterList(torch.empty(inner, hidden) for _ in range(experts))
        self.down = nn.ParameterList(torch.empty(hidden, inner) for _ in range(experts))
        self._table: ExpertTable | None = None
        self._on_device: DeviceBank | None = None
        self._place: tuple[int, ...] = ()

    @property
    def capturable(self) -> bool:
        """Where the card's kernels take it; else the host sorts the tokens by expert."""
        gate, up, down = _matrices(self.gate), _matrices(self.up), _matrices(self.down)
        return can_launch(gate[0]) and self._device_bank(gate, up, down) is not None

    @property
    def table(self) -> ExpertTable | None:
        """Of 16-bit matrices, as they lie."""
        return self._native_table(_matrices(self.gate), _matrices(self.up), _matrices(self.down))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers."""
        gate, up, down = _matrices(self.gate), _matrices(self.up), _matrices(self.down)
        if torch.is_grad_enabled():
            return run_experts(x, ids, weights, gate, up, down, self.activation)
        # The choice of experts is data: inside a compiled graph it must be one opaque operation.
        if torch.compiler.is_compiling():
            return torch.ops.lmx.experts(x, ids, weights, gate, up, down, self.activation)
        if can_launch(x):
            bank = self._device_bank(gate, up, down)
            if bank is not None and bank.can_take(x, weights):
                return bank.answer(x, ids, weights)
        few, many = are_few(x, gate[0].shape[1]), _are_many(x, gate[0])
        table = self._native_table(gate, up, down) if few or many else None
        if table is not None:
            return table.answer(x, ids, weights) if few else answer_many(table, x, ids, weights)
        run = run_experts_once if len(x) == 1 else run_experts
        return run(x, ids, weights, gate, up, down, self.activation)

    def _native_table(self, gate: list[Tensor], up: list[Tensor], down: list[Tensor]) -> ExpertTable | None:
        """What the kernels are told, once for as long as the matrices stay where they are."""
        matrices = (*gate, *up, *down)
        if self._is_elsewhere(matrices):
            narrow = all(can_multiply(matrix) and matrix.element_size() == 2 for matrix in matrices)
            self._table = ExpertTable(_describe(gate, up, down), self.activation) if narrow else None
        return self._table

    def _device_bank(self, gate: list[Tensor], up: list[Tensor], down: list[Tensor]) -> "DeviceBank | None":
        """The same of the kernels for CUDA devices."""
        matrices = (*gate, *up, *down)
        if self._is_elsewhere(matrices) and all(map(can_describe, matrices)):
            from lmx.core.gpu.experts import DeviceBank

            self._on_device = DeviceBank.make(_describe(gate, up, down), self.activation)
        return self._on_device

    def _is_elsewhere(self, matrices: tuple[Tensor, ...]) -> bool:
        """Whether the matrices lie elsewhere than when this was last asked."""
        place = tuple(matrix.data_ptr() for matrix in matrices)
        before, self._place = self._place, place
        return place != before

    def __getstate__(self) -> dict[str, object]:
        """Without the tables, which a copy makes of its own tensors."""
        return {**self.__dict__, "_table": None, "_on_device": None, "_place": ()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpertBank":
        self._table, self._on_device, self._place = None, None, ()  # they hold the tensors that they were made of
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _are_many(x: Tensor, matrix: Tensor) -> bool:
    """Whether the kernels take a prompt through a bank of such matrices."""
    return x.dtype == matrix.dtype == torch.bfloat16 and can_take(x, matrix.shape[1]) and has_panels()


def _describe(gate: list[Tensor], up: list[Tensor], down: list[Tensor]) -> list[Expert]:
    banks = [[StoredMatrix.kept(matrix.detach()) for matrix in matrices] for matrices in (gate, up, down)]
    return list(zip(*banks, strict=True))


def _matrices(experts: nn.ParameterList) -> list[Tensor]:
    """What `list(experts)` is, in a hundredth of the time: a decode step asks for hundreds."""
    return cast(list[Tensor], list(experts._parameters.values()))

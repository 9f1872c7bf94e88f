"""Layers on quantized matrices: a linear layer and a bank of experts, on the bytes as a checkpoint holds them.

The tensors of a matrix may be views of a mapped file: nothing here copies or repacks them. They are no parameters,
because a change of the model's dtype must not reach them: the format fixes their dtypes. A move to a device does.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lmx.core.config import ModelConfig
from lmx.core.errors import InputError
from lmx.core.heads import CausalHead
from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.layers.moe import Bank
from lmx.core.layers.projection import Projection
from lmx.core.layers.residual import added
from lmx.core.native.matrix import answer_many, has_panels
from lmx.core.native.mixer import Affine
from lmx.core.native.vector import ExpertTable, are_few, can_take, wants_gradient
from lmx.quant.gpu import device_bank, serves_few
from lmx.quant.int8 import Int8
from lmx.quant.matmul import Matrix, Product, QuantMatrix, choose_product, dequantize
from lmx.quant.native import expert_table, matrix_table
from lmx.quant.serialize import matrix_tensors

TensorFunction = Callable[[Tensor], Tensor]


class QuantLinear(Projection):
    """A linear layer with a quantized weight [out_features, in_features] and, if any, a bias that is not quantized.

    forward: x [..., in_features] of any float dtype -> [..., out_features] of the same. Gradients flow to x and bias.
    """

    def __init__(self, weight: QuantMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        _check_matrix(weight)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self._product: Product = choose_product(weight)
        self._table = matrix_table(weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`."""
        out = self._product(x)
        bias = self.bias
        if bias is None:
            return out
        return added(out, bias if bias.dtype == out.dtype else bias.to(out.dtype))

    def affine(self) -> Affine | None:
        """Matrix and bias as the CPU's kernels read them; None where they cannot."""
        return None if self._table is None else Affine(self._table, self.bias)

    @property
    def capturable(self) -> bool:
        """In int8 only with our own kernel: LLM.int8() looks on the host for columns that stand out."""
        return not isinstance(self.weight, Int8) or serves_few(self.weight)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight, in `dtype` or in that of its source."""
        return dequantize(self.weight, dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        scheme = "int8" if isinstance(self.weight, Int8) else self.weight.quant_type
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={scheme}"

    def _apply(self, fn: TensorFunction, recurse: bool = True) -> "QuantLinear":
        self.weight = _move(self.weight, fn)
        self._product, self._table = choose_product(self.weight), matrix_table(self.weight)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination.update(matrix_tensors(f"{prefix}weight", self.weight))
        super()._save_to_state_dict(destination, prefix, keep_vars)


class QuantHead(CausalHead):
    """`lmx.core.heads.CausalHead` on a quantized matrix [vocab, hidden]; the embedding takes no part in it."""

    def __init__(self, config: ModelConfig, weight: QuantMatrix) -> None:
        super().__init__(config, tied=True)
        self.output = QuantLinear(weight)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: [batch, length, hidden] -> [batch, length, vocab], in the dtype of the embedding."""
        return self.capped(self.output(hidden.to(embedding.dtype)))


class QuantExpertBank(Bank):
    """`lmx.core.layers.moe.ExpertBank` on quantized matrices: gated MLPs, `down(act(gate(x)) * up(x))`.

    gate, up: one matrix [inner, hidden] an expert; down: one [hidden, inner] an expert. A matrix that was kept from
    quantization stands among them as a plain tensor.
    forward: x [tokens, hidden], ids and weights [tokens, top_k] -> [tokens, hidden]. An expert that no token chose is
    not touched, so that its pages stay on disk.
    """

    def __init__(
        self,
        gate: Sequence[Matrix],
        up: Sequence[Matrix],
        down: Sequence[Matrix],
        activation: str,
    ) -> None:
        super().__init__()
        if not len(gate) == len(up) == len(down) > 0:
            raise InputError(
                f"{len(gate)} gate, {len(up)} up and {len(down)} down matrices make no bank of experts",
                "the checkpoint lacks some experts: download or quantize it again",
            )
        self.gate, self.up, self.down = list(gate), list(up), list(down)
        self.activation = activation
        self._choose_products()

    @property
    def capturable(self) -> bool:
        """Where the card's kernels take it; else the host sorts the tokens by expert."""
        return self._on_device is not None

    @property
    def table(self) -> ExpertTable | None:
        """As they are stored."""
        return self._table

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers, in the dtype of x.

        The kernels of the device take all of it in one call. Else tokens are sorted by expert, so that each expert that
        was hit is dequantized once.
        """
        if self._on_device is not None and self._on_device.can_take(x, weights):
            return self._on_device.answer(x, ids, weights)
        table = self._table
        if table is not None and can_take(x, table.hidden) and not wants_gradient(weights):
            if are_few(x, table.hidden):
                return table.answer(x, ids, weights)
            if x.dtype == torch.bfloat16 and has_panels():
                return answer_many(table, x, ids, weights)
        top_k = ids.shape[-1]
        out = torch.zeros_like(x)
        order = ids.flatten().argsort(stable=True)  # [tokens * top_k], by expert
        counts = torch.bincount(ids.flatten(), minlength=len(self.gate)).tolist()
        flat_weights = weights.flatten()
        for expert, slots in enumerate(torch.split(order, counts)):
            if not len(slots):
                continue
            tokens = slots // top_k
            answer = self.expert(expert, x[tokens]) * flat_weights[slots, None]  # [tokens of this expert, hidden]
            out = out.index_add(0, tokens, answer.to(out.dtype))
        return out

    def expert(self, number: int, x: Tensor) -> Tensor:
        """One expert's answer: x [tokens, hidden] -> [tokens, hidden]."""
        gate, up, down = self._products[number]
        return down(ACTIVATIONS[self.activation](gate(x)) * up(x))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        inner, hidden = self.gate[0].shape
        return f"experts={len(self.gate)}, hidden={hidden}, inner={inner}"

    def _choose_products(self) -> None:
        for matrix in (*self.gate, *self.up, *self.down):
            _check_matrix(matrix)
        self._products = [
            (choose_product(gate), choose_product(up), choose_product(down))
            for gate, up, down in zip(self.gate, self.up, self.down, strict=True)
        ]
        self._table = expert_table(self.gate, self.up, self.down, self.activation)
        self._on_device = device_bank(self.gate, self.up, self.down, self.activation)

    def _apply(self, fn: TensorFunction, recurse: bool = True) -> "QuantExpertBank":
        for matrices in (self.gate, self.up, self.down):
            matrices[:] = [fn(m) if isinstance(m, Tensor) else _move(m, fn) for m in matrices]
        self._choose_products()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _check_matrix(q: Matrix) -> None:
    if len(q.shape) != 2:
        raise InputError(f"a quantized tensor of shape {list(q.shape)} is no matrix", "only matrices can be multiplied")


def _move(q: QuantMatrix, fn: TensorFunction) -> QuantMatrix:
    """Follow a module's move to another device. Integers show the device alone, whatever else `fn` does to floats."""
    device = fn(torch.empty(0, dtype=torch.uint8, device=q.device)).device
    return q if device == q.device else q.to(device)

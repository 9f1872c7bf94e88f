"""Models of random weights, straight in the form in which they are stored: to measure what needs no meaning.

Speed does not depend on the numbers as long as they are finite, so a block of noise is drawn once and laid over every
matrix: billions of parameters take seconds, and there is never a 16-bit copy of what is quantized.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lmx.core.destinations import Destinations
from lmx.core.large_pages import lasting_zeros
from lmx.core.layers.norm import OffsetRMSNorm, RMSNorm
from lmx.core.layers.rg_lru import RGLRU
from lmx.core.loader import assign, build, hub_shapes
from lmx.core.mapped import stored_name
from lmx.core.model import LanguageModel
from lmx.core.models.falcon_mamba import FalconMambaConfig, Mixer, initialise_scan
from lmx.core.models.recurrent_gemma import RecurrentGemmaConfig
from lmx.core.native.compiled import library
from lmx.core.placement import Budget
from lmx.core.registry import family_of
from lmx.core.safetensors_file import TensorInfo
from lmx.quant.apply import HeadScheme, install
from lmx.quant.codebook import dynamic_map
from lmx.quant.four_bit import NESTED_BLOCK_SIZE, FourBit, NestedScales
from lmx.quant.int8 import Int8
from lmx.quant.matmul import QuantMatrix
from lmx.quant.plan import layout_bytes, make_plan
from lmx.quant.serialize import layout
from lmx.quant.spec import QuantSpec

# No power of two, so that the rows of a matrix are not alike.
_BLOCK = (1 << 22) - 3
_HEAD = "head.weight"
# The root mean square of the 16 values of a four-bit type, and of 8-bit codes, is near to this share of absmax.
_RMS_OF_CODES = 0.57


class DummyModel:
    """What a model of random weights will be; `build` makes it. bytes: of all its weights."""

    def __init__(
        self,
        config: Mapping[str, object],
        *,
        spec: QuantSpec | None = None,
        head_scheme: HeadScheme | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """config: a config.json. spec: how its matrices are quantized, if at all. Raises InputError."""
        self._config, self._dtype = config, dtype
        with torch.device("meta"):
            self._model = build(config)
        self._specs = self._quantized(spec)
        if head_scheme is not None:
            self._specs[_HEAD] = QuantSpec(head_scheme)
        self._sizes = {name: self._nbytes(name, shape) for name, shape in self._shapes().items()}
        self.nbytes = sum(self._sizes.values())

    def places(self, device: torch.device | None = None, budgets: Sequence[Budget] = ()) -> Destinations:
        """Where `build` will make the weights; the arguments are those of `lmx.core.loader.load_model`."""
        return Destinations.plan(self._model, self._sizes, self._dtype, device, budgets)

    def build(self, places: Destinations | None = None) -> LanguageModel:
        """Make the weights where they will lie (None is the CPU), and the model, in evaluation mode."""
        places = places or self.places()
        noises = {device: _Noise(self._dtype, device) for device in places.placement.devices}
        matrices = {}
        for name, shape in self._shapes().items():
            noise = noises[places.of(name)]
            if name in self._specs:
                matrices[name] = noise.matrix(shape, self._specs[name])
            else:
                assign(self._model, name, noise.plain(shape))
        install(self._model, matrices)
        _settle(self._model)
        places.settle()
        return self._model.eval()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that is to be made; of a tied head that is quantized, its own copy too."""
        shapes = {name: tuple(weight.shape) for name, weight in self._model.named_parameters()}
        if _HEAD in self._specs:
            shapes[_HEAD] = tuple(self._model.decoder.embed.weight.shape)
        return shapes

    def _quantized(self, spec: QuantSpec | None) -> dict[str, QuantSpec]:
        """The parameters that quantizing a checkpoint of this shape would quantize, each with its spec."""
        if spec is None:
            return {}
        name, size = stored_name(self._dtype), self._dtype.itemsize
        shapes = hub_shapes(self._model, family_of(self._config))
        infos = {hub: TensorInfo(hub, name, shape, Path(), 0, prod(shape) * size) for hub, shape in shapes.items()}
        return {weight.ours: spec for weight in make_plan(self._config, infos, spec).weights if weight.kept is None}

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        if name in self._specs:
            return layout_bytes(layout(name, shape, self._specs[name], self._dtype))
        return prod(shape) * self._dtype.itemsize


class _Noise:
    """Blocks of random numbers on a device; every matrix is laid out there, from another place in them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._dtype, self._device = dtype, device
        self._bytes = torch.randint(0, 256, (_BLOCK,), dtype=torch.uint8, generator=generator).to(device)
        self._eights = self._bytes.view(torch.int8).clamp(min=-127)
        self._normal = torch.randn(_BLOCK, generator=generator).to(dtype).to(device)
        self._scales = torch.empty(_BLOCK).uniform_(0.5, 1.5, generator=generator).to(device)
        narrow = dtype == torch.bfloat16 and device.type == "cpu" and library() is not None  # as `FourBit.narrowed`
        self._scales_of_blocks = self._scales.bfloat16() if narrow else self._scales
        self._place = 0

    def plain(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros for a vector; else normal numbers that keep the size of what they multiply."""
        if len(shape) < 2:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        return self._laid(self._normal, prod(shape), shape[-1] ** -0.5).view(shape)

    def matrix(self, shape: tuple[int, ...], spec: QuantSpec) -> QuantMatrix:
        """A quantized matrix [rows, columns] that keeps the size of what it multiplies."""
        rows, columns = shape
        scale = columns**-0.5 / _RMS_OF_CODES
        if spec.four_bit_type is None:
            weight = self._laid(self._eights, rows * columns).view(shape)
            return Int8(weight, self._laid(self._scales, rows, scale), self._dtype)
        packed = self._laid(self._bytes, -(-rows * columns // 2)).unsqueeze(1)
        blocks, nested = -(-rows * columns // spec.block_size), None
        if spec.double_quant:
            absmax = self._laid(self._bytes, blocks)
            groups = self._laid(self._scales, -(-blocks // NESTED_BLOCK_SIZE), 0.3 * scale)
            nested = NestedScales(groups, dynamic_map().to(self._device), scale)
        else:
            absmax = self._laid(self._scales_of_blocks, blocks, scale)
        return FourBit(packed, absmax, spec.four_bit_type, shape, self._dtype, spec.block_size, nested)

    def _laid(self, block: Tensor, size: int, scale: float | None = None) -> Tensor:
        """`size` numbers of the block, over and over, times `scale`."""
        out = lasting_zeros((size,), block.dtype) if block.is_cpu else block.new_empty(size)
        self._place = (self._place + 9973) % _BLOCK
        done, first = 0, self._place
        while done < size:
            part = block[first : first + size - done]
            place = out[done : done + len(part)]
            if scale is None:
                place.copy_(part)
            else:
                torch.mul(part, scale, out=place)
            done, first = done + len(part), 0
        return out


@torch.no_grad()
def _settle(model: LanguageModel) -> None:
    """Norms as the identity, and recurrences with parameters for which they stay finite."""
    config = model.config
    for module in model.modules():
        if isinstance(module, RMSNorm | nn.LayerNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, OffsetRMSNorm):
            module.weight.zero_()
        elif isinstance(module, Mixer) and isinstance(config, FalconMambaConfig):
            initialise_scan(module, config)
        elif isinstance(module, RGLRU) and isinstance(config, RecurrentGemmaConfig):
            module.reset_parameters(config.w_init_variance_scale)

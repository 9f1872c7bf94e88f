"""The norms of dt, B and C by the CUDA kernel against torch's."""

import pytest
import torch
from gpu_paths import random, relative_error, tolerance

from lmx.core.gpu import recurrent
from lmx.core.layers.norm import rms_normalise_parts


@pytest.mark.parametrize("sizes", [(256, 16, 16), (1, 5, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_is_normalised_by_itself(sizes, dtype, device):
    x = random(2, 3, sum(sizes)).to(device, dtype) * torch.logspace(-3, 3, sum(sizes), device=device).to(dtype)
    x[0, 0, -1] = torch.nan
    assert recurrent.can_normalise_parts(x, sizes)
    expected = [torch.nn.functional.rms_norm(p, p.shape[-1:], None, 1e-6) for p in x.double().cpu().split(sizes, -1)]
    for got, part in zip(rms_normalise_parts(x, sizes, 1e-6), expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.isnan().cpu(), part.isnan())
        assert relative_error(got.nan_to_num(), part.nan_to_num()) < tolerance(dtype, device)


def test_what_is_left_to_torch(device):
    x = random(2, 9).to(device)
    assert not recurrent.can_normalise_parts(x, (4, 5))
    assert not recurrent.can_normalise_parts(x.t(), (1, 1, 0))
    assert not recurrent.can_normalise_parts(x.requires_grad_(), (3, 3, 3))

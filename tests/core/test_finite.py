"""NaN and infinity are found in every dtype that a checkpoint may have, wherever they stand."""

import pytest
import torch

from lmx.core.errors import InputError
from lmx.core.finite import check_finite, is_finite
from lmx.core.mapped import torch_dtypes


@pytest.mark.parametrize("dtype", torch_dtypes().values(), ids=torch_dtypes())
def test_numbers_are_finite(dtype):
    assert is_finite(torch.arange(-3, 30).clamp(min=0 if dtype in (torch.bool, torch.uint8) else -3).to(dtype))
    assert is_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("dtype", [dtype for dtype in torch_dtypes().values() if dtype.is_floating_point], ids=str)
def test_what_is_no_number_is_found(dtype, place, bad):
    if dtype == torch.float8_e4m3fn:
        bad = float("nan")  # it has no infinity
    x = torch.ones(100, dtype=dtype)
    x[place] = bad
    with pytest.raises(InputError, match=r"'x' holds NaN or infinity"):
        check_finite(x, "'x'")

"""The main kernels of wide slots with coefficients that are given, compiled and emulated, against float64 autograd."""

from collections import Counter

import pytest
import torch

from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, HyperConfig
from support.kernel_cases import HALF, check_given, wide

pytestmark = pytest.mark.slow
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    (HyperConfig(slots=4), 1024, 17, BF16, "rmsnorm", False),
    (HyperConfig(slots=2), 768, 9, FP16, "rmsnorm", True),  # half of the second chunk is padding
    (HyperConfig(slots=4), 512, 1, FP16, None, False),
    (FracConfig(rate=2), 1024, 9, BF16, "rmsnorm", False),
]


@pytest.mark.parametrize(("config", "width", "tokens", "dtype", "kind", "one_plus"), CASES)
def test_against_float64(
    emulator: Emulator,
    config: FracConfig | HyperConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool,
) -> None:
    """Where one of the two gradients is absent the general kernel runs: for that of x, and for the mixed residual's."""
    check_given(wide(config, width, tokens, dtype, kind, one_plus), HALF[dtype])
    names = Counter(name for name, _ in emulator.launches)
    assert (names["wide_forward_kernel"], names["wide_backward_kernel"], names["width_backward_kernel"]) == (1, 1, 2)

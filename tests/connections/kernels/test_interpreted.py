"""The kernels in Triton's interpreter: every option, which would take minutes to compile, and what they are to the bit
as they are written, before a compiler orders their sums.
"""

import math

import pytest
import torch

from megatron_fc import FracConfig, FracConnection, HyperConfig
from megatron_fc.connections.kernels import launch
from support import kernel_cases, kernel_reference
from support.isolation import stays_alone
from support.kernel_cases import CONFIGS, FP32, UNBOUNDED, check, name


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_option_in_fp32(config: FracConfig) -> None:
    unbounded = config.dynamic and not (config.tanh and config.norm != "none")
    # With one fraction the norm takes gamma out again: its gradient is what is left of a cancellation.
    kind = "rmsnorm" if config.rate > 1 else None
    case = kernel_reference.make(config, 48 * config.rate, 5, torch.float32, kind)
    check(case, UNBOUNDED if unbounded else FP32)


HYPER = [
    HyperConfig(slots=16),
    HyperConfig(slots=8, fractions=2, dynamic=False),
    HyperConfig(slots=2, dynamic_beta=False),
    HyperConfig(slots=4, dynamic_beta=False, norm="layernorm", norm_affine=False),
    HyperConfig(slots=4, dynamic_alpha=False, norm_affine=False),
    HyperConfig(slots=4, fractions=2, dynamic_alpha=False, scale=False),
    FracConfig(rate=2, dynamic_alpha=False, norm_affine=False),
]


@pytest.mark.parametrize("config", HYPER, ids=name)
def test_shapes_and_parts_of_the_prediction(config: FracConfig | HyperConfig) -> None:
    check(kernel_reference.make(config, 48 * config.fractions, 3, torch.float32, "layernorm"), FP32)


def test_absent_gradients_of_wide_streams_are_zero() -> None:
    case = kernel_reference.make(HyperConfig(slots=4), 64, 5, torch.float32, "rmsnorm")
    no_x, no_beta, no_mixed = map(torch.zeros_like, (case.g_x, case.g_beta, case.g_mixed))
    pairs = [
        ((case.g_x, None, None), (case.g_x, no_beta, no_mixed)),
        ((None, case.g_beta, case.g_mixed), (no_x, case.g_beta, case.g_mixed)),
    ]
    for absent, given in pairs:
        one, other = (launch.width_backward(*g, case.h, case.operands, case.norm) for g in (absent, given))
        torch.testing.assert_close(one[0], other[0])


@pytest.mark.parametrize("kind", [None, "rmsnorm", "layernorm"])
@pytest.mark.parametrize("c", [16, 48, 80, 512])
def test_widths_and_norms_of_the_sublayer(c: int, kind: str | None) -> None:
    check(kernel_reference.make(FracConfig(rate=4), 4 * c, 3, torch.float32, kind), FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boundary_equals_depth_and_width_to_the_bit(dtype: torch.dtype) -> None:
    """As the kernels are written; a compiler may order the sums of one in another way."""
    case = kernel_reference.make(FracConfig(rate=4), 320, 17, dtype, "rmsnorm")
    found, expected = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=True))
    for result, value in expected.items():
        if result == "g_beta":  # sums of c terms in another order
            torch.testing.assert_close(found[result], value, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(found[result], value), result


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter cuts bf16 off, it does not round
def test_identity_at_the_initial_values(dtype: torch.dtype) -> None:
    """x is h to the bit, and h' what Megatron's own sum gives."""
    case = kernel_reference.make(FracConfig(rate=4), 256, 17, dtype, None)
    x, beta, alpha = launch.width_forward(case.h, FracConnection(256, case.config).operands())
    assert x is not None
    assert torch.equal(x, case.h)
    assert torch.equal(launch.depth_forward(launch.DepthInputs(case.o, case.h, beta, alpha)), case.o + case.h)


# Options that `test_operations.py` does not compile.
ISOLATED = [
    (FracConfig(rate=1), "rmsnorm", math.nan),
    (FracConfig(rate=2), None, math.inf),
    (FracConfig(rate=8), "layernorm", math.inf),
    (FracConfig(rate=4, norm="none", tanh=False, scale=False), None, math.nan),
    (FracConfig(rate=4, norm="none"), None, -math.inf),
]


@pytest.mark.parametrize(("config", "kind", "bad"), ISOLATED)
def test_a_token_that_is_not_finite_changes_no_other(config: FracConfig, kind: str | None, bad: float) -> None:
    case = kernel_reference.make(config, 32 * config.rate, 32 // config.rate, torch.float32, kind)  # two tiles
    stays_alone(case, bad, "triton")

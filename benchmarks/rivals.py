"""Contestants that are not ours: Megatron's residual path, and packages of the family on nearest equivalent work."""

from collections.abc import Sequence

import torch
from torch import Tensor

from case import EPS, Absent, Case, Program, rms_norm
from megatron_fc.errors import UserError
from record import installed_version

STREAMS = 4  # of Liger's mHC


def megatron(operation: str, case: Case, kind: str) -> Program:
    """Norm and bias-dropout-add as Megatron's layers call them: no bias, dropout 0, fused on CUDA as by default.

    fused_residual_rmsnorm is Transformer Engine's MakeExtraOutput + RMSNorm: the norm returns its input too, and their
    backward passes are one kernel, which adds the residual's gradient.
    """
    try:
        from megatron_fc.training.machine import has_transformer_engine
    except UserError as error:
        raise Absent(str(error)) from None
    if kind != "torch" and not has_transformer_engine():
        raise Absent("Transformer Engine is not installed")
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.width,
        num_attention_heads=1,
        normalization="RMSNorm",
        params_dtype=case.dtype,
        fused_residual_rmsnorm=kind == "fused_residual",
        use_cpu_initialization=case.device.type == "cpu",
        persist_layer_norm=False,
    )
    if kind == "torch":
        norms = [WrappedTorchNorm(config, case.width, EPS).to(case.device, case.dtype) for _ in range(2)]
    else:
        from megatron.core.extensions.transformer_engine import TENorm

        norms = [TENorm(config, case.width, EPS, has_residual=kind == "fused_residual") for _ in range(2)]
    bias_dropout_add = get_bias_dropout_add(True, case.device.type == "cuda")
    h, (o, o2) = case.h, case.o
    weights = [norm.weight for norm in norms]

    def norm(number: int, h: Tensor) -> tuple[Tensor, Tensor]:
        out = norms[number](h)
        return out if isinstance(out, tuple) else (out, h)

    def add(o: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add((o, None), residual, 0.0)

    def boundary() -> Sequence[Tensor]:
        x, residual = norm(1, add(o, h))
        return residual, x

    def layer() -> Sequence[Tensor]:
        x, residual = norm(0, h)
        x2, residual = norm(1, add(o, residual))
        return x, x2, add(o2, residual)

    # Where the norm returns its input too, that has a gradient.
    normed = (lambda: norm(0, h)) if kind == "fused_residual" else (lambda: norm(0, h)[:1])
    return {
        "width+norm": Program(normed, [h, weights[0]], [case.g_x, case.g_h][: 2 if kind == "fused_residual" else 1]),
        "depth": Program(lambda: [add(o, h)], [h, o], [case.g_h]),
        "boundary": Program(boundary, [h, o, weights[1]], [case.g_h, case.g_x]),
        "layer": Program(layer, [h, o, o2, *weights], [case.g_x, case.g_x2, case.g_h]),
    }[operation]


def liger_mhc(case: Case) -> Program:
    """Liger-Kernel's manifold-constrained Hyper-Connections: 4 streams of the width, what its layers would pay."""
    _installed("liger-kernel")
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    width, n = case.width, STREAMS
    outputs = n * n + 2 * n

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device)

    h = random(case.tokens, n, width).to(case.dtype).requires_grad_()
    g = random(case.tokens, n, width).to(case.dtype)
    sites = [
        (
            (0.02 * random(n * width, outputs)).to(case.dtype).requires_grad_(),
            torch.zeros(outputs, device=case.device, requires_grad=True),
            *(torch.ones((), device=case.device, requires_grad=True) for _ in range(3)),
        )
        for _ in range(2)
    ]

    def site(number: int, h: Tensor) -> tuple[Tensor, Tensor]:
        pre, post, res = liger_mhc_coeffs(h, *sites[number])
        x = rms_norm(liger_mhc_pre(h, pre), case.norms[number])
        return x, liger_mhc_post_res(h, case.o[number], post, res)

    def layer() -> Sequence[Tensor]:
        x, h2 = site(0, h)
        x2, h3 = site(1, h2)
        return x, x2, h3

    inputs = [h, *case.o, *(p for site in sites for p in site), *case.norms]
    return Program(layer, inputs, [case.g_x, case.g_x2, g])


def hyper_connections(case: Case) -> Program:
    """Its `num_fracs` with one stream: fractions of the same width, mixed by another operator."""
    _installed("hyper-connections")
    from hyper_connections import HyperConnections

    if case.config.rate == 1:
        raise Absent("its num_fracs=1 is a Hyper-Connection")
    sites = [
        HyperConnections(1, dim=case.width, layer_index=0, num_fracs=case.config.rate).to(case.device, case.dtype)
        for _ in range(2)
    ]

    def site(number: int, h: Tensor) -> tuple[Tensor, Tensor]:
        x, add = sites[number](h)
        return rms_norm(x, case.norms[number]), add(case.o[number].unsqueeze(0))

    def layer() -> Sequence[Tensor]:
        x, h2 = site(0, case.h.unsqueeze(0))
        x2, h3 = site(1, h2)
        return x.squeeze(0), x2.squeeze(0), h3.squeeze(0)

    inputs = [case.h, *case.o, *(p for site in sites for p in site.parameters()), *case.norms]
    return Program(layer, inputs, [case.g_x, case.g_x2, case.g_h])


def _installed(package: str) -> None:
    if installed_version(package) == "not installed":
        raise Absent("not installed")

"""The kernels of others that are compared with ours: RMSNorm, and mHC with four streams, in bf16."""

import triton.language as tl

from calibrate import LLAMA, PROCESSORS
from laboratory.simulator.kernel import Partial, Token
from peer_builds import Cut, InTileLang, InTransformerEngine, InTriton, N, Peer

TOKENS = 16384
M = 2 * N + N * N  # coefficients of a token
P, F = "*bf16", "*fp32"
LIGER, MEGATRON, TILE, TE = "Liger-Kernel", "Megatron-LM dev", "TileKernels", "TransformerEngine"
_LIGER, _MEGATRON = "liger_kernel.ops.", "megatron.core.fusions.fused_mhc_kernels"
_POST, _APPLY = "tile_kernels/mhc/post_kernel.py", "tile_kernels/mhc/pre_apply_mix_kernel.py"
_NORM = "transformer_engine/common/normalization/rmsnorm/rtc/rmsnorm_{}_kernel.cu"
# A file of each package that is not installed here, and what to name to have it.
FILES = {
    MEGATRON: (_MEGATRON.replace(".", "/") + ".py", "a checkout of NVIDIA/Megatron-LM's branch dev"),
    TILE: (_POST, "a checkout of deepseek-ai/TileKernels"),
    "tilelang": ("tilelang/__init__.py", "a folder that pip install --target FOLDER tilelang filled"),
    TE: (_NORM.format("fwd"), "a checkout of NVIDIA/TransformerEngine"),
}
# Values per token are read again by every block of columns, from L2 like sums: where the ruler's guess of their bytes
# would be several per cent of all, they are SUMS.
VALUES, SUMS = Token(), Partial()
NO_TRITON = "no Triton kernel: torch, or cuTile, which does not run on Hopper"
SINKHORN = "values per token alone, of which the ruler only guesses the bytes"


def post_cut(width: int) -> Cut:
    """As Liger's table says."""
    from liger_kernel.ops.mhc import _post_res_default_meta

    return Cut(*_post_res_default_meta(width))


PEERS = (
    InTriton(
        LIGER, "RMSNorm forward", 2, {"X_ptr": 2, "Y_ptr": 2, "RSTD_ptr": VALUES},
        place=(_LIGER + "rms_norm", "_rms_norm_forward_kernel"), cut=lambda d: Cut(1, d, 8),
        call=lambda d, c: (P, d, P, d, P, 1, F, 1, d, 1e-6, 0.0, LLAMA, True, d),
    ),
    InTriton(
        LIGER, "RMSNorm backward", 3, {"dY_ptr": 2, "dX_ptr": 2, "X_ptr": 2, "RSTD_ptr": VALUES, "dW_ptr": SUMS},
        place=(_LIGER + "rms_norm", "_rms_norm_backward_kernel"), cut=lambda d: Cut(1, d, 8), programs=1,
        call=lambda d, c: (
            P, d, P, d, P, d, tl.bfloat16, P, 1, F, 1, F, d, TOKENS, d, 0.0, -(-TOKENS // PROCESSORS),
            LLAMA, True, d,
        ),
    ),
    InTransformerEngine(
        TE, "RMSNorm forward", 2, {"x": 2, "z": 2, "rs": VALUES}, place=(_NORM.format("fwd"), "fwd"),
        cut=lambda d: Cut(4 if d == 2048 else 1, d),
    ),
    InTransformerEngine(
        TE, "RMSNorm backward", 3, {"x": 2, "dz": 2, "dx": 2, "rs": VALUES, "dgamma_part": SUMS},
        place=(_NORM.format("bwd"), "bwd"),
    ),
    InTriton(
        LIGER, "mHC coefficients forward", N, {"x_ptr": 2 * N, "phi_ptr": SUMS, "mix_ptr": VALUES, "invr_ptr": VALUES},
        place=(_LIGER + "mhc", "_mhc_mm_norm_fwd_kernel"), cut=lambda d: Cut(32, d),
        call=lambda d, c: (P, P, F, F, TOKENS, N * d, M, N * d, 1, M, 1, M, 1, 1e-6, c.tokens, 256, 32, False),
    ),
    InTriton(
        LIGER, "mHC coefficients backward", 2 * N,
        {"x_ptr": 2 * N, "grad_x_ptr": 2 * N, **dict.fromkeys(("phi_ptr", "mix_ptr", "grad_mix_ptr", "invr_ptr",
         "grad_phi_ptr"), SUMS)},
        place=(_LIGER + "mhc", "_mhc_mm_norm_bwd_fused_kernel"), cut=lambda d: Cut(32, 256 // N),
        call=lambda d, c: (
            P, P, F, F, F, P, F, TOKENS, N * d, M, N * d, 1, M, 1, M, 1, 1, M, 1, N * d, 1, M, 1,
            c.tokens, N * c.columns, 32, False,
        ),
    ),
    InTriton(
        LIGER, "mHC read forward", N + 1, {"x_ptr": 2 * N, "out_ptr": 4, "hpre_ptr": VALUES}, torch=3,
        place=(_LIGER + "mhc", "_mhc_pre_fwd_kernel"), cut=lambda d: Cut(32, 128),
        call=lambda d, c: (P, F, F, TOKENS, N, d, N * d, d, 1, N, 1, d, 1, c.tokens, c.columns),
    ),
    InTriton(
        LIGER, "mHC read backward", 2 * N + 1,
        {"x_ptr": 2 * N, "grad_out_ptr": 4, "grad_x_ptr": 4 * N, "hpre_ptr": VALUES, "grad_h_ptr": SUMS},
        torch=3 + 3 * N, place=(_LIGER + "mhc", "_mhc_pre_bwd_kernel"), cut=lambda d: Cut(32, 128),
        call=lambda d, c: (
            P, F, F, F, F, TOKENS, N, d, N * d, d, 1, N, 1, d, 1, N * d, d, 1, N, 1, c.tokens, c.columns,
        ),
    ),
    InTriton(
        LIGER, "mHC write forward", 2 * N + 1,
        {"x_ptr": 2 * N, "f_ptr": 2, "out_ptr": 4 * N, "hpost_ptr": SUMS, "hres_ptr": SUMS}, torch=3 * N,
        place=(_LIGER + "mhc", "_mhc_post_res_fwd_kernel"), cut=post_cut,
        call=lambda d, c: (
            P, P, F, F, F, TOKENS, N, d, N * d, d, 1, d, 1, N, 1, N * N, N, 1, N * d, d, 1, c.tokens, c.columns,
        ),
    ),
    InTriton(
        LIGER, "mHC write backward", 3 * N + 2,
        {"x_ptr": 2 * N, "f_ptr": 2, "grad_out_ptr": 4 * N, "grad_x_ptr": 4 * N, "grad_f_ptr": 4, "hpost_ptr": SUMS,
         "hres_ptr": SUMS, "grad_hpost_ptr": SUMS, "grad_hres_ptr": SUMS},
        torch=6 * N + 3, place=(_LIGER + "mhc", "_mhc_post_res_bwd_kernel"), cut=post_cut,
        call=lambda d, c: (
            P, P, F, F, F, F, F, F, F, TOKENS, N, d, N * d, d, 1, d, 1, N, 1, N * N, N, 1, N * d, d, 1, N * d, d, 1,
            d, 1, N, 1, N * N, N, 1, c.tokens, c.columns,
        ),
    ),
    Peer(LIGER, "mHC Sinkhorn, forward and backward", reason=SINKHORN),
    InTriton(
        MEGATRON, "mHC read forward", N + 1, {"x_ptr": 2 * N, "out_ptr": 2, "h_ptr": VALUES},
        place=(_MEGATRON, "_triton_h_agg_fwd_kernel"),
        call=lambda d, c: (P, P, P, TOKENS, d, N, N * d, d, 1, c.columns, c.tokens),
    ),
    Peer(MEGATRON, "mHC read backward", reason=NO_TRITON),
    InTriton(
        MEGATRON, "mHC write forward", 2 * N + 1,
        {"orig_ptr": 2 * N, "x_ptr": 2, "out_ptr": 2 * N, "hr_ptr": VALUES, "hp_ptr": VALUES},
        place=(_MEGATRON, "_triton_hpb_fwd_kernel"),
        call=lambda d, c: (
            P, P, P, P, P, P, TOKENS, d, N, N * N, N, 1, N * d, d, 1, N * d, d, 1, False, c.columns, c.tokens,
        ),
    ),
    InTriton(
        MEGATRON, "mHC write backward, streams", 2 * N + 1,
        {"go_ptr": 2 * N, "g_orig_ptr": 2 * N, "g_x_ptr": 2, "hr_ptr": VALUES, "hp_ptr": VALUES},
        place=(_MEGATRON, "_triton_hpb_bwd_g_x_orig_kernel"),
        call=lambda d, c: (
            P, P, P, P, P, TOKENS, d, N, N * d, d, 1, N * N, N, 1, N * d, d, 1, c.columns, c.tokens,
        ),
    ),
    InTriton(
        MEGATRON, "mHC write backward, coefficients", 2 * N + 1,
        {"go_ptr": 2 * N, "orig_ptr": 2 * N, "x_ptr": 2, "g_hr_ptr": VALUES, "g_hp_ptr": VALUES},
        place=(_MEGATRON, "_triton_hpb_bwd_g_hp_hr_kernel"), whole=True, warps=4,
        call=lambda d, c: (
            P, P, P, P, P, P, TOKENS, d, N, N * d, d, 1, N * d, d, 1, N * N, N, 1, False, c.columns, c.tokens,
        ),
    ),
    Peer(MEGATRON, "mHC Sinkhorn, forward and backward", reason=SINKHORN),
    Peer(MEGATRON, "mHC coefficients", reason=NO_TRITON),
    InTileLang(
        TILE, "mHC read forward", N + 1, {"x": 2 * N, "o": 2, "mix": VALUES}, place=(_APPLY, "_mhc_pre_apply_mix_fwd"),
    ),
    InTileLang(
        TILE, "mHC read backward", 2 * N + 1,
        {"x": 2 * N, "o_grad": 2, "x_grad": 4 * N, "mix": VALUES, "mix_grad": VALUES},  # it adds to x_grad
        place=(_APPLY, "_mhc_pre_apply_mix_bwd"),
    ),
    InTileLang(
        TILE, "mHC write forward", 2 * N + 1, {"b": 2 * N, "d": 2, "x": 2 * N, "a": VALUES, "c": VALUES},
        place=(_POST, "_mhc_post_fwd"),
    ),
    InTileLang(
        TILE, "mHC write backward", 3 * N + 2,
        {"b": 2 * N, "d": 2, "dx": 2 * N, "db": 2 * N, "dd": 2, **dict.fromkeys(("a", "c", "da", "dc"), VALUES)},
        place=(_POST, "_mhc_post_bwd"),
    ),
    Peer(TILE, "mHC coefficients forward", reason="it loads through TMA, which the reader does not follow"),
    Peer(TILE, "mHC coefficients backward", reason="its programs go over all tokens, in loops of different rounds"),
    Peer(TILE, "mHC Sinkhorn, forward and backward", reason=SINKHORN),
)  # fmt: skip

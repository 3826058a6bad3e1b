"""Bytes that autograd keeps for backward, per token and layer, of real Megatron layers; prints a Markdown table.

    python benchmarks/saved_bytes.py

Counted at the end of the forward pass with torch's saved-tensor hooks: every storage once, parameters left out. The
figure is what a second layer adds to a first one, so that what two layers share counts once. It needs no GPU: shapes
and dtypes are what they are on one, but for the attention, whose unfused torch form stands for all connections alike.
"""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rank import one_rank

from megatron_fc import FracConfig
from megatron_fc.megatron.specs import connect

WIDTH, HEADS, FFN, SEQUENCE, BATCH = 512, 8, 2048, 128, 2
CONNECTIONS: dict[str, FracConfig | None] = {
    "residual": None,
    "SFCx4": FracConfig(rate=4, dynamic=False),
    "DFCx2": FracConfig(rate=2),
    "DFCx4": FracConfig(rate=4),
    "DFCx8": FracConfig(rate=8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recompute:
    """What is recomputed: by Megatron (`--recompute-modules layernorm`), by us (`--frac-recompute`)."""

    layernorm: bool = False
    frac: bool = False


def saved_bytes(frac: FracConfig | None, dtype: torch.dtype, recompute: Recompute, dropout: float = 0.0) -> float:
    """Bytes kept for backward per token and layer."""
    if frac is not None:
        frac = replace(frac, recompute=recompute.frac)
    config = _config(dtype, recompute.layernorm, dropout)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    spec = get_gpt_layer_local_spec()
    spec = spec if frac is None else connect(spec, frac)
    layers = torch.nn.ModuleList([spec(config=config, layer_number=number).to(dtype) for number in (1, 2)])
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    not_activations = {tensor.untyped_storage().data_ptr() for tensor in (mask, *layers.parameters())}
    h, totals = torch.randn(SEQUENCE, BATCH, WIDTH, dtype=dtype, requires_grad=True), []
    with saved_tensors() as saved:
        for layer in layers:
            h, _ = layer(h, attention_mask=mask)
            # After the layer: Megatron's recompute empties a storage after it was saved.
            sizes = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in saved)}
            totals.append(sum(size for pointer, size in sizes.items() if pointer not in not_activations))
    return (totals[1] - totals[0]) / (SEQUENCE * BATCH)


def sublayer_output_bytes(dtype: torch.dtype) -> int:
    """Bytes of the two sub-layer outputs per token and layer, which the depth connections need in backward."""
    return 2 * WIDTH * dtype.itemsize


def _config(dtype: torch.dtype, layernorm: bool, dropout: float) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        attention_dropout=0.0,
        hidden_dropout=dropout,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.unfused,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        recompute_granularity="selective" if layernorm else None,
        recompute_modules=["layernorm"] if layernorm else None,
    )


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """Collect what autograd saves."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def table() -> str:
    columns: dict[str, Recompute] = {
        "no recompute": Recompute(),
        "Megatron's `layernorm`": Recompute(layernorm=True),
        "`frac_recompute`": Recompute(frac=True),
        "both": Recompute(layernorm=True, frac=True),
    }
    lines = [f"| | | {' | '.join(columns)} | target |", "|---|---|" + "---:|" * (len(columns) + 1)]
    for dtype_name, dtype in DTYPES.items():
        target = f"{saved_bytes(None, dtype, Recompute()) + sublayer_output_bytes(dtype):,.0f}"
        for name, frac in CONNECTIONS.items():
            cells: list[Any] = [
                "" if frac is None and column.frac else f"{saved_bytes(frac, dtype, column):,.0f}"
                for column in columns.values()
            ]
            lines.append(f"| {dtype_name} | {name} | {' | '.join(cells)} | {target if frac else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with one_rank():
        print(table())

"""NVIDIA Megatron-Bridge's OLMoE with Frac-Connections: a provider takes a connected spec.

    python examples/megatron_bridge.py

Needs Megatron-Bridge (0.6.2 was tried), as NVIDIA's NeMo container has it. Without it this is one sentence. You should
see OLMoE's norms over all heads, and a falling loss:

    OLMoE    2 layers, 4 connections dfc_x4, 4 norms over all heads
    loss     5.5... -> ...
"""

from typing import Any

from one_process import SEQUENCE, VOCABULARY, losses, one_process, small_config  # before Megatron

# isort: split

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from megatron_fc import FracConfig, FracConnection
from megatron_fc.megatron.norm_options import NormOptions
from megatron_fc.megatron.norm_over_heads import NormOverHeads
from megatron_fc.megatron.specs import connect, place_norms

# Kernels that need Transformer Engine or Apex: leave these out where you have them.
FUSED = ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
FUSED += ("gradient_accumulation_fusion", "cross_entropy_loss_fusion", "moe_permute_fusion", "moe_grouped_gemm")
FUSED += ("persist_layer_norm",)


def connected(config: Any) -> Any:
    """The spec that the provider calls with its own config."""
    plain = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return connect(place_norms(plain, NormOptions(qk_layernorm_over_heads=True)), FracConfig(rate=4))


def main() -> None:
    try:
        from megatron.bridge.models.olmoe.olmoe_provider import OlMoEModelProvider
    except ModuleNotFoundError as error:
        raise SystemExit(f"examples/megatron_bridge.py needs Megatron-Bridge, and {error.name} is missing") from None
    small_config()  # its seeds
    provider = OlMoEModelProvider(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=64,
        kv_channels=16,
        num_attention_heads=4,
        num_query_groups=4,
        num_moe_experts=4,
        moe_router_topk=2,
        seq_length=SEQUENCE,
        vocab_size=VOCABULARY,
        transformer_layer_spec=connected,
        use_cpu_initialization=True,
        **dict.fromkeys(FUSED, False),
    )
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    kinds = [type(module) for module in model.modules()]
    print(
        f"OLMoE    2 layers, {kinds.count(FracConnection)} connections dfc_x4, "
        f"{kinds.count(NormOverHeads)} norms over all heads"
    )
    first, *_, last = losses(model, steps=10)
    print(f"loss     {first:.4f} -> {last:.4f}")


if __name__ == "__main__":
    with one_process():
        main()

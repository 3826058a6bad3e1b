"""OLMoE and OLMo2 as Megatron's arguments say them, and as Hugging Face's configurations do."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import ManifoldConfig
from megatron_fc.connections.per_slot import predicts_alpha, predicts_beta
from megatron_fc.errors import UserError
from megatron_fc.training.recipe import Recipe

Architecture = Literal["olmoe", "olmo2"]
NAMES: dict[Architecture, str] = {"olmoe": "OLMoE", "olmo2": "OLMo2"}
# How the types of models with connections begin.
CONNECTED = "connected_"
_CLASSES: dict[Architecture, str] = {"olmoe": "OlmoeForCausalLM", "olmo2": "Olmo2ForCausalLM"}
_NOTHING = (None, False, 0)

# What both architectures have, by Megatron's argument; the values that are theirs.
_BOTH: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": _NOTHING,
    "qk_layernorm": (True,),
    "qk_layernorm_over_heads": (True,),
    "qk_l2_norm": _NOTHING,
    "swiglu": (True,),
    "glu_linear_offset": _NOTHING,
    "activation_func_clamp_value": _NOTHING,
    "add_bias_linear": _NOTHING,
    "add_qkv_bias": _NOTHING,
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": _NOTHING,
    "use_rope_scaling": _NOTHING,
    "rotary_seq_len_interpolation_factor": _NOTHING,
    "no_rope_freq": _NOTHING,
    "multi_latent_attention": _NOTHING,
    "experimental_attention_variant": _NOTHING,
    "attention_output_gate": _NOTHING,
    "window_size": _NOTHING,
    "softmax_type": ("vanilla",),
    "mtp_num_layers": _NOTHING,
    "apply_residual_connection_post_layernorm": _NOTHING,
    "heterogeneous_layers_config_path": _NOTHING,
    "use_mup": _NOTHING,
}
_OF: dict[Architecture, dict[str, tuple[Any, ...]]] = {
    "olmoe": {
        "norm_after": (False,),
        "moe_layer_freq": (1,),
        "moe_shared_expert_intermediate_size": _NOTHING,
        "moe_latent_size": _NOTHING,
        "moe_router_score_function": ("softmax",),
        "moe_router_topk_scaling_factor": (*_NOTHING, 1.0),
        "moe_router_num_groups": _NOTHING,
        "moe_router_enable_expert_bias": _NOTHING,
        "moe_router_force_load_balancing": _NOTHING,
        "moe_router_force_biased": (None,),
        "moe_expert_capacity_factor": _NOTHING,
        "moe_apply_probs_on_input": _NOTHING,
    },
    "olmo2": {"norm_after": (True,), "num_experts": _NOTHING},
}


def architecture_of(args: Namespace, recipe: Recipe) -> Architecture:
    """Return which of the two a run's model is.

    Raises:
        UserError: neither; names the first argument that does not fit.
    """
    architecture: Architecture = "olmoe" if args.num_experts else "olmo2"
    if recipe.family != "gpt":
        raise UserError(f"family={recipe.family} has no Hugging Face class: a model of family=gpt can be converted")
    for name, values in (_BOTH | _OF[architecture]).items():
        value = getattr(args, name, None)
        if value not in values:
            raise UserError(
                f"{name}={value} is not that of {NAMES[architecture]}, which has {values[0]}: "
                f"only OLMoE and OLMo2 have Hugging Face classes here, and a model has to be trained as one of them"
            )
    # Balanced by a loss, the best experts of each token are chosen as they are.
    for balancing in {"sinkhorn", "quantile_balancing"}.intersection(_balancing(args) if args.num_experts else ()):
        raise UserError(
            f"moe_router_load_balancing_type={balancing} chooses other experts than {NAMES[architecture]}, which is "
            f"balanced by a loss alone: only OLMoE and OLMo2 have Hugging Face classes here"
        )
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        raise UserError(
            f"kv_channels={args.kv_channels}: {NAMES[architecture]} has heads that are together as wide as the model, "
            f"hidden_size / num_attention_heads = {args.hidden_size // args.num_attention_heads}"
        )
    return architecture


def huggingface_config(
    architecture: Architecture, args: Namespace, connection: ConnectionConfig | None, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """Return the content of `config.json`.

    Args:
        architecture: of the model.
        args: Megatron's.
        connection: of the model.
        vocabulary: rows of the embedding.
        dtype: of the weights, as torch names it.
    """
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": args.hidden_size,
        "intermediate_size": (args.moe_ffn_hidden_size if args.num_experts else None) or args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "initializer_range": args.init_method_std,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "attention_bias": False,
        "attention_dropout": args.attention_dropout,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "use_cache": True,
    }
    if architecture == "olmoe":
        config |= {
            "num_experts": args.num_experts,
            "num_experts_per_tok": args.moe_router_topk,
            # A softmax over the best experts alone is one over all of them, renormalised.
            "norm_topk_prob": not args.moe_router_pre_softmax,
            "router_aux_loss_coef": _coefficient(args),
        }
    if connection is not None:
        model = f"Connected{_CLASSES[architecture]}"
        config |= {
            "architectures": [model],
            "model_type": f"{CONNECTED}{architecture}",
            "connection": _connection(connection),
            "auto_map": {
                "AutoConfig": f"configuration_connected_olmo.{model.removesuffix('ForCausalLM')}Config",
                "AutoModelForCausalLM": f"modeling_connected_olmo.{model}",
            },
        }
    return config


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """Say which fields of a Hugging Face configuration a run's arguments contradict.

    Args:
        theirs: content of its `config.json`, its defaults filled in.
        ours: what `huggingface_config` makes of the arguments.
    """
    if theirs.get("clip_qkv") is not None:
        yield f"clip_qkv={theirs['clip_qkv']} of the model is not in Megatron"
    without_influence = {"architectures", "dtype", "initializer_range", "use_cache", "router_aux_loss_coef"}
    without_influence |= {"max_position_embeddings", "attention_dropout"}
    for name, value in ours.items():
        if name not in without_influence and theirs.get(name) != value:
            yield f"{name} is {theirs.get(name)} in the model and {value} in the config"


def _coefficient(args: Namespace) -> float:
    value = args.moe_aux_loss_coeff
    return float(value[0] if isinstance(value, list) else value)


def _balancing(args: Namespace) -> list[str]:
    value = args.moe_router_load_balancing_type
    return value if isinstance(value, list) else [value]


def _connection(connection: ConnectionConfig) -> dict[str, Any]:
    """The options that change what a connection computes, in the words of `remote_code`."""
    options: dict[str, Any] = {"slots": connection.slots, "fractions": connection.fractions}
    values = asdict(connection)
    if isinstance(connection, ManifoldConfig):
        of_kind = ("sinkhorn_iterations", "sinkhorn_eps", "norm_eps", "leave")
        return {"kind": "manifold", **options, **{name: values[name] for name in of_kind}}
    per_slot: Any = connection
    names = ("norm", "norm_affine", "norm_eps", "tanh", "scale", "initial_scale")
    dynamic = {"dynamic_beta": predicts_beta(per_slot), "dynamic_alpha": predicts_alpha(per_slot)}
    return {"kind": "per_slot", **options, **dynamic, **{name: values[name] for name in names}}

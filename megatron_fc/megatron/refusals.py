"""Megatron options that would drop or corrupt a connection without a word: each is refused by name."""

import sys
from argparse import Namespace
from typing import NoReturn

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError

# Values of `cuda_graph_impl` that capture layers one by one.
CAPTURE_LAYERS = ("local", "transformer_engine")


def refuse_unsupported_config(config: TransformerConfig, connection: ConnectionConfig) -> None:
    """Check what a layer can see; every norm slot calls this when it is built, whichever way its spec came.

    Args:
        config: of the layer.
        connection: of its sites.

    Raises:
        UserError: names the option and what to do.
    """
    args = training_args()
    if args is not None:
        refuse_with_connection(args, connection)
    refuse_with_stream_layers(config, connection)
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if stages == 2 and virtual > 1 and not config.overlap_p2p_comm:
        raise UserError(
            "overlap_p2p_comm=False with virtual stages on two pipeline ranks mixes up their messages: set "
            "overlap_p2p_comm=True and batch_p2p_comm=False"
        )
    if config.inference_fuse_tp_communication:
        raise UserError(
            "inference_fuse_tp_communication adds the residual inside the projections and would skip the depth "
            "connection: turn it off"
        )
    if config.fused_residual_rmsnorm:
        raise UserError(
            "fused_residual_rmsnorm takes the residual from the norm and would bypass the width connection: turn it off"
        )
    if getattr(config, "mla_down_proj_fusion", False) and config.is_hybrid_model:
        raise UserError(
            "mla_down_proj_fusion overwrites the norm slot of a hybrid stack's MLA layers, and with it their width "
            "connection: turn it off"
        )
    if config.fine_grained_activation_offloading:
        freed = sorted({"attn_norm", "mlp_norm"} & set(config.offload_modules or []))
        if freed:
            raise UserError(
                f"offload_modules={freed} frees the residual that the depth connection saved for backward: "
                f"leave attn_norm and mlp_norm out of offload_modules"
            )
    refuse_captured_layers(config, connection)
    if config.cuda_graph_impl in CAPTURE_LAYERS and _recomputes_layernorm(config):
        raise UserError(
            f"recompute_modules=['layernorm'] accumulates the width connection's gradients by itself, which a captured "
            f"layer (cuda_graph_impl={config.cuda_graph_impl}) does not return: set recompute of FracConfig "
            f"(--frac-recompute) instead"
        )


def refuse_with_connection(args: Namespace, connection: ConnectionConfig, on_gpu: bool | None = None) -> None:
    """Check Megatron's arguments against a connection, before or after Megatron's own validation.

    Args:
        args: Megatron's arguments.
        connection: of the model.
        on_gpu: as of `refuse_unsupported_args`.

    Raises:
        UserError: names the option and what to do.
    """
    refuse_unsupported_args(args, on_gpu)
    refuse_captured_layers(args, connection)
    refuse_with_stream_layers(args, connection)
    stages = getattr(args, "pipeline_model_parallel_layout", None)
    begins_alone = isinstance(stages, str) and "t" not in stages.partition("|")[0]
    if connection.is_wide and begins_alone and getattr(args, "overlap_moe_expert_parallel_comm", False):
        refuse_unentered_stream(connection)


def refuse_unentered_stream(connection: ConnectionConfig) -> NoReturn:
    """Refuse a stage of the embedding alone in Megatron's combined schedule."""
    raise UserError(
        f"overlap_moe_expert_parallel_comm leaves out the decoder of a stage of the embedding alone, where the stream "
        f"of {connection.label} begins: give that stage a layer, or drop the overlap"
    )


def refuse_captured_layers(config: TransformerConfig | Namespace, connection: ConnectionConfig) -> None:
    """Check that no layer with a wider stream is captured as a CUDA graph by itself.

    Raises:
        UserError: one is; Megatron sizes its input by the layer's `hidden_size`.
    """
    impl, width = getattr(config, "cuda_graph_impl", "none"), config.hidden_size
    if impl in CAPTURE_LAYERS and connection.is_wide:
        raise UserError(
            f"cuda_graph_impl={impl} captures layers whose input is hidden_size={width} wide, and the stream of "
            f"{connection.label} has {connection.stream_width(width)} values per token: use full_iteration"
        )


def refuse_with_stream_layers(options: TransformerConfig | Namespace, connection: ConnectionConfig) -> None:
    """Check that nothing makes recompute of the stream useless, or frees or replaces what it computes from.

    Args:
        options: of a layer, or Megatron's arguments.
        connection: of the layers.

    Raises:
        UserError: names the option and what to do.
    """
    if not connection.stream_layers:
        return

    def has(name: str) -> bool:
        return bool(getattr(options, name, False))

    reason = None
    if getattr(options, "recompute_granularity", None) == "full":
        reason = "recompute_granularity=full keeps one stream per recomputed part already: drop one of the two"
    elif _recomputes_layernorm(options):
        reason = (
            "recompute_modules=['layernorm'] runs the width connection again from the stream, which would be kept: "
            "take layernorm out of recompute_modules"
        )
    elif (graphs := getattr(options, "cuda_graph_impl", None)) in CAPTURE_LAYERS:
        reason = (
            f"a layer in a graph of its own (cuda_graph_impl={graphs}) cannot compute streams of other layers again: "
            f"use cuda_graph_impl=full_iteration or none"
        )
    elif has("overlap_moe_expert_parallel_comm"):
        reason = (
            "overlap_moe_expert_parallel_comm cuts the graph between the parts of a layer, and every part would keep "
            "the stream: drop one of the two"
        )
    elif has("cpu_offloading") or has("cpu_offloading_num_layers"):
        reason = "cpu_offloading would move sub-layers' outputs that have to stay: drop one of the two"
    elif has("use_megatron_fsdp") or has("use_torch_fsdp2"):
        fsdp = "use_megatron_fsdp" if has("use_megatron_fsdp") else "use_torch_fsdp2"
        reason = (
            f"{fsdp} releases parameters of other layers, which computing the stream again reads: use the "
            f"distributed optimizer"
        )
    if reason is not None:
        raise UserError(f"stream_layers={connection.stream_layers} of {connection.label}: {reason}")


def _recomputes_layernorm(config: TransformerConfig | Namespace) -> bool:
    selective = getattr(config, "recompute_granularity", None) == "selective"
    return selective and "layernorm" in (getattr(config, "recompute_modules", None) or [])


def training_args() -> Namespace | None:
    """The arguments of Megatron's training loop, None where megatron-core is used without it.

    Nothing is imported for them: who has not imported the loop has no arguments, and perhaps not what it needs.
    """
    global_vars = sys.modules.get("megatron.training.global_vars")
    return None if global_vars is None else global_vars._GLOBAL_ARGS


def uses_matrix_optimizer(args: Namespace | None) -> bool:
    """Whether the optimizer may treat 2-D parameters as linear maps, as Muon does; assumed where nothing tells."""
    return args is None or args.optimizer not in ("adam", "sgd")


def refuse_unsupported_args(args: Namespace, on_gpu: bool | None = None) -> None:
    """Check what only Megatron's training arguments show: optimizer, sharding, checkpoints.

    Args:
        args: Megatron's arguments.
        on_gpu: whether the run will have CUDA devices; None looks for one here.

    Raises:
        UserError: names the option and what to do.
    """
    if uses_matrix_optimizer(args) and getattr(args, "decoupled_lr", None) is not None:
        raise UserError(
            f"optimizer={args.optimizer} leaves the connections' matrices to Adam as it does the embeddings, and "
            f"decoupled_lr={args.decoupled_lr} would be their learning rate too: drop decoupled_lr"
        )
    if getattr(args, "use_torch_fsdp2", False) and (args.bf16 or args.fp16):
        raise UserError(
            "use_torch_fsdp2 wants one parameter dtype per layer and the connections' parameters stay fp32 in a "
            "half-precision model: use the distributed optimizer instead"
        )
    if getattr(args, "use_megatron_fsdp", False):
        _refuse_with_megatron_fsdp(args)
    half = args.bf16 or args.fp16
    saves_optimizer = args.save and not args.no_save_optim and args.ckpt_format == "torch_dist"
    if half and saves_optimizer and (torch.cuda.is_available() if on_gpu is None else on_gpu):
        _refuse_unwritable_optimizer(args)


def _refuse_unwritable_optimizer(args: Namespace) -> None:
    """Half-precision models keep the connections' parameters in fp32, which Megatron 0.19 writes in one case only."""
    # Megatron's validation turns the one into the other for Muon.
    if not (args.use_distributed_optimizer or getattr(args, "use_layer_wise_distributed_optimizer", False)):
        raise UserError(
            "Megatron's plain half-precision optimizer cannot write fp32 parameters into a torch_dist checkpoint, and "
            "connections keep theirs in fp32: set use_distributed_optimizer"
        )
    first = getattr(args, "connection_parameters_first", None)
    if first is False or (first is None and args.hybrid_layer_pattern):
        raise UserError(
            "Megatron's distributed optimizer writes fp32 parameters only if they come first, which a --spec that the "
            "script does not call (hybrid_..., layer_...) cannot arrange: use megatron-fc train, or add "
            "megatron_fc.megatron.parameter_order.connection_parameters_first to the model config's pre_wrap_hooks"
        )


def _refuse_with_megatron_fsdp(args: Namespace) -> None:
    """Its sharded gradients are overwritten, not added to, when a parameter's gradient comes in two parts."""
    if _recomputes_layernorm(args):
        raise UserError(
            "use_megatron_fsdp takes a gradient when it is accumulated first, and recompute_modules=['layernorm'] "
            "accumulates those that width and depth connection share twice: set recompute of FracConfig "
            "(--frac-recompute) instead"
        )
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        raise UserError(
            "use_megatron_fsdp with overlap_moe_expert_parallel_comm runs the depth connection's backward pass before "
            "it gathers that connection's parameters: use one of the two"
        )

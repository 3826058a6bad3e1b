"""A config as planning sees it: what Megatron's validated arguments say, in plain numbers."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_fc.checkpoints.retention import Retention, kept_checkpoints
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.kernels.availability import has_main_kernels, without_kernels
from megatron_fc.errors import UserError
from megatron_fc.megatron.norm_options import norms_from_args
from megatron_fc.planning.calibration import assumptions
from megatron_fc.planning.devices import Device
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.shape import Latent, Recompute, Shape, Training
from megatron_fc.preflight.batch_schedule import steps_and_samples
from megatron_fc.preflight.validation import Validated, validate
from megatron_fc.training.precision import refuse_on_device
from megatron_fc.training.recipe import Recipe

# Change memory, bytes or time, and are refused while nobody has counted how.
_LEFT_OUT = (
    "experimental_attention_variant",
    "moe_latent_size",
    "moe_pad_expert_input_to_capacity",
    "attention_output_gate",
    "use_torch_fsdp2",
    "fp32_residual_connection",
    "fine_grained_activation_offloading",
    "optimizer_cpu_offload",
    "distribute_saved_activations",
    "moe_layer_recompute",
    "first_last_layers_bf16",
    "mtp_use_repeated_layer",
)
# Options that suit one pipeline alone, and Megatron's names of them among its arguments.
_OF_A_PIPELINE = {
    "num_layers_per_virtual_pipeline_stage": "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout": "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers": "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers": "decoder_last_pipeline_num_layers",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
}
_COUNTED_ONLY = {"hidden_dropout": (0.0,), "num_distributed_optimizer_instances": (1,)}


def shape_of(run: Validated) -> Shape:
    """The model of a run.

    Raises:
        UserError: planning does not count something in it.
    """
    args = run.args
    for problem in _not_counted(run):
        raise UserError(problem)
    moe, norms = _moe_layers(args), norms_from_args(args)
    return Shape(
        moe_layers=moe,
        width=args.hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_size=args.qk_head_dim + args.qk_pos_emb_head_dim if args.multi_latent_attention else args.kv_channels,
        ffn=args.ffn_hidden_size,
        vocabulary=args.padded_vocab_size,
        sequence=args.seq_length,
        experts=args.num_experts or 0,
        top_k=args.moe_router_topk if args.num_experts else 0,
        expert_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else 0,
        shared_ffn=args.moe_shared_expert_intermediate_size or 0,
        shared_gate=bool(args.moe_shared_expert_intermediate_size and args.moe_shared_expert_gate),
        gated=args.swiglu,
        clamped=args.activation_func_clamp_value is not None,
        tied=not args.untie_embeddings_and_output_weights,
        norm_vectors=1 if args.normalization == "RMSNorm" else 2,
        qk_norm=args.qk_layernorm,
        over_heads=norms.qk_layernorm_over_heads,
        norm_after=norms.norm_after,
        rotary=args.position_embedding_type == "rope",
        learned_positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        connection=run.recipe.connection,
        latent=_latent(args) if args.multi_latent_attention else None,
        window=args.window_size[0] + 1 if args.window_size else 0,
        windowed=_windowed(args),
        predicted=args.mtp_num_layers or 0,
    )


def _latent(args: Namespace) -> Latent:
    return Latent(args.q_lora_rank, args.kv_lora_rank, args.qk_pos_emb_head_dim, args.v_head_dim)


def _windowed(args: Namespace) -> tuple[bool, ...]:
    """As `is_layer_window_attention` of Megatron: every n-th layer has none, or a list says which have one."""
    if not args.window_size:
        return ()
    skip = args.window_attn_skip_freq
    if skip is None:
        return (True,) * args.num_layers
    if isinstance(skip, int):
        return tuple((index + 1) % skip != 0 for index in range(args.num_layers))
    return tuple(bool(one) for one in skip)


def training_of(run: Validated) -> Training:
    """How a run trains its model."""
    args, connection = run.args, run.recipe.connection
    half = args.bf16 or args.fp16
    apart = not _is_te(args) or (connection is not None and connection.applies_norm)
    return Training(
        element_bytes=2 if half else 4,
        gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2,
        master_bytes=_bytes(args, "main_params_dtype"),
        moment_bytes=_bytes(args, "exp_avg_dtype") + _bytes(args, "exp_avg_sq_dtype"),
        distributed_optimizer=args.use_distributed_optimizer,
        shard_gradients=args.use_megatron_fsdp and "grads" in args.data_parallel_sharding_strategy,
        shard_weights=args.use_megatron_fsdp and "params" in args.data_parallel_sharding_strategy,
        sequence_parallel=args.sequence_parallel,
        recompute=_recompute(args, connection),
        tensor_scales=args.fp8_recipe == "tensorwise",
        products="fp4" if args.fp4 else "fp8" if args.fp8 else "half",
        flash=_is_flash(args),
        # What may be left to Transformer Engine's projections are the norms before attention and a dense MLP.
        norms_apart=(apart, apart, True),
        fused_connections=connection is not None and _is_fused(connection),
        main_kernels=isinstance(connection, FracConfig) or _runs_on_main_kernels(connection),
        fused_residual=args.fused_residual_rmsnorm,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        overlap_tensor=args.tp_comm_overlap,
        overlap_experts=args.overlap_moe_expert_parallel_comm,
        captured=_captured(args),
        fused_loss=args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te",
        fp8_output=bool(getattr(args, "fp8_output_proj", False)),
        fused_experts=bool(args.use_transformer_engine_op_fuser),
        sends_once=args.moe_token_dispatcher_type == "flex",
        group=args.microbatch_group_size_per_vp_stage,
        target_tokens=run.target_tokens,
    )


def _captured(args: Namespace) -> tuple[str, ...]:
    """Modules in CUDA graphs; a graph of whole layers captures all but the experts' dynamic shapes, and they too."""
    if args.cuda_graph_impl == "none":
        return ()
    modules = tuple(getattr(module, "name", str(module)) for module in args.cuda_graph_modules or ())
    return modules or ("all",)


def _not_counted(run: Validated) -> Iterator[str]:
    args = run.args
    if args.padded_vocab_size is None:
        yield "vocab_size is not set, and plan counts the embedding: set it to the tokenizer's size"
    if run.recipe.family != "gpt":
        yield f"family={run.recipe.family} is not counted by plan: family=gpt is the same model where it has no Mamba"
    if args.optimizer != "adam":
        yield f"optimizer={args.optimizer} is not counted by plan, which knows adam's states"
    for name in _LEFT_OUT:
        if getattr(args, name, None):
            yield f"{name}={getattr(args, name)} is not counted by plan: drop it to plan without"
    for name, counted in _COUNTED_ONLY.items():
        if getattr(args, name) not in counted:
            yield f"{name}={getattr(args, name)} is not counted by plan: set it to {counted[0]} to plan without"
    if args.attention_dropout and not _is_flash(args):
        yield (
            f"attention_dropout={args.attention_dropout} of unfused attention is not counted by plan: set it to 0 to "
            f"plan without"
        )
    if args.context_parallel_size > 1 and set(args.cp_comm_type) != {"p2p"}:
        yield f"cp_comm_type={args.cp_comm_type} is not counted by plan, which knows the ring: set it to [p2p]"


def _moe_layers(args: Namespace) -> tuple[bool, ...]:
    if not args.num_experts:
        return (False,) * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return tuple(index % args.moe_layer_freq == 0 for index in range(args.num_layers))
    return tuple(bool(moe) for moe in args.moe_layer_freq)


def _bytes(args: Namespace, name: str) -> int:
    """Of an element of the optimizer's state; Megatron has made torch dtypes of the names."""
    return int(getattr(args, name).itemsize) if args.use_precision_aware_optimizer else 4


def _is_te(args: Namespace) -> bool:
    return bool(args.transformer_impl == "transformer_engine")


def _is_flash(args: Namespace) -> bool:
    return _is_te(args) and args.attention_backend.name not in ("unfused", "local")


def _is_fused(connection: ConnectionConfig) -> bool:
    """Whether there are kernels for it, which the machines of the run are taken to have.

    Raises:
        UserError: the kernels are insisted on and cannot run it.
    """
    lacks = without_kernels(connection)
    if lacks and connection.backend == "triton":
        raise UserError(f"backend=triton cannot run: {lacks}; set backend=auto or backend=torch")
    return connection.backend != "torch" and not lacks


def _of_connections(shape: Shape, training: Training) -> Iterator[str]:
    if shape.connection is None:
        return
    if not training.fused_connections:
        yield f"{shape.connection.label} is planned as its torch operations run, without fused kernels"
    elif not training.main_kernels:
        yield (
            f"the kernels of {shape.connection.label} are planned at the speed of memory; they are predicted to miss "
            f"it, in backward by a factor of three (docs/kernels.md)"
        )


def _runs_on_main_kernels(connection: ConnectionConfig | None) -> bool:
    """Those mix slots with coefficients on a manifold, and predict what is per slot, every coefficient of it."""
    if connection is None:
        return False
    on_manifold = isinstance(connection, ManifoldConfig)
    predicted = isinstance(connection, HyperConfig) and connection.dynamic
    return (on_manifold or predicted) and has_main_kernels(connection.slots, connection.fractions, on_manifold)


def _recompute(args: Namespace, connection: ConnectionConfig | None) -> Recompute:
    # Without modules Megatron's TransformerConfig takes attention.
    modules = tuple(args.recompute_modules or ("core_attn",)) if args.recompute_granularity == "selective" else ()
    return Recompute(
        granularity=args.recompute_granularity or "none",
        modules=modules,
        method=args.recompute_method or "uniform",
        layers=args.recompute_num_layers or 1,
        connections=connection is not None and connection.recompute,
        stream_layers=connection.stream_layers if connection else 0,
    )


def kept_of(recipe: Recipe, args: Namespace) -> tuple[int, int]:
    """`kept_checkpoints` of a run; none where it saves nothing."""
    if not (args.save and args.save_interval):
        return 0, 0
    megatrons = Retention(1, args.save_retain_interval) if args.save_retain_interval else None
    return kept_checkpoints(recipe.retention or megatrons, steps_and_samples(args)[0], args.save_interval)


def plan_of(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    gpu: Device,
    gpus_per_node: int | None = None,
    network: float | None = None,
    nvlink: float | None = None,
    assumed: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a config for a number of nodes; needs no GPU.

    Args:
        config, overrides, nodes: as for `validate`.
        gpu: of all nodes.
        gpus_per_node: None for as many as its usual machine has.
        network: 1e9 bytes per second that a GPU sends to other NVLink domains, None for its usual machine's.
        nvlink: 1e9 bytes per second that a GPU sends inside its NVLink domain, None for its data sheet's.
        assumed: constants by the names of `Assumptions`, in place of those fitted to published runs.

    Raises:
        UserError: as `validate`, or planning does not count something in the config.
    """
    network = gpu.network_gb_per_second if network is None else network
    nvlink = gpu.nvlink_gb_per_second if nvlink is None else nvlink
    for name, speed in (("network_gb_per_second", network), ("nvlink_gb_per_second", nvlink)):
        if not speed > 0:
            raise UserError(f"{name}={speed} must be greater than 0")
    run = validate(config, overrides, nodes, gpu.gpus_per_node if gpus_per_node is None else gpus_per_node)
    shape, training = shape_of(run), replace(training_of(run), transposes=gpu.capability < (10, 0))
    refuse_on_device(run.args, gpu.capability)
    return Plan(
        name=f"{config.stem} {run.recipe.label}",
        shape=shape,
        training=training,
        layout=run.layout,
        gpu=replace(gpu, nvlink_gb_per_second=nvlink),
        network=network,
        assumed=replace(assumptions(gpu, training.products), **assumed or {}),
        notes=(*run.unchecked, *_of_connections(shape, training)),
        pipeline_settings=tuple(option for option, name in _OF_A_PIPELINE.items() if getattr(run.args, name)),
        kept_checkpoints=kept_of(run.recipe, run.args),
    )

"""A config as planning sees it: what Megatron's validated arguments say, in plain numbers."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_fc.backend import TRITON_RATES
from megatron_fc.errors import UserError
from megatron_fc.megatron.topology import Validated, validate
from megatron_fc.planning.devices import Device
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.roofline import Assumptions
from megatron_fc.planning.shape import Recompute, Shape, Training


def shape_of(run: Validated) -> Shape:
    """The model of a run.

    Raises:
        UserError: planning does not count something in it.
    """
    args = run.args
    for problem in _not_counted(run):
        raise UserError(problem)
    moe = _moe_layers(args)
    return Shape(
        moe_layers=moe,
        width=args.hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_size=args.kv_channels,
        ffn=args.ffn_hidden_size,
        vocabulary=args.padded_vocab_size,
        sequence=args.seq_length,
        experts=args.num_experts or 0,
        top_k=args.moe_router_topk if args.num_experts else 0,
        expert_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else 0,
        shared_ffn=args.moe_shared_expert_intermediate_size or 0,
        gated=args.swiglu,
        tied=not args.untie_embeddings_and_output_weights,
        norm_vectors=1 if args.normalization == "RMSNorm" else 2,
        qk_norm=args.qk_layernorm,
        rotary=args.position_embedding_type == "rope",
        learned_positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        frac=run.recipe.frac,
    )


def training_of(run: Validated) -> Training:
    """How a run trains its model."""
    args, frac = run.args, run.recipe.frac
    half = args.bf16 or args.fp16
    te = args.transformer_impl == "transformer_engine"
    fused = frac is not None and frac.backend != "torch" and frac.rate in TRITON_RATES
    apart = not te or (frac is not None and frac.input_norm == "width")
    return Training(
        element_bytes=2 if half else 4,
        gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2,
        master_bytes=_bytes(args, "main_params_dtype"),
        moment_bytes=_bytes(args, "exp_avg_dtype") + _bytes(args, "exp_avg_sq_dtype"),
        distributed_optimizer=args.use_distributed_optimizer,
        sequence_parallel=args.sequence_parallel,
        recompute=_recompute(args, frac is not None and frac.recompute),
        fp8=bool(args.fp8),
        flash=te and args.attention_backend.name not in ("unfused", "local"),
        # What may be left to Transformer Engine's projections are the norms before attention and a dense MLP.
        norms_in_width=(fused and apart, fused and apart, fused),
        fused_connections=fused,
        fused_residual=args.fused_residual_rmsnorm,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        overlap_tensor=args.tp_comm_overlap,
        overlap_experts=args.overlap_moe_expert_parallel_comm,
        target_tokens=run.target_tokens,
    )


def _not_counted(run: Validated) -> Iterator[str]:
    args = run.args
    if args.padded_vocab_size is None:
        yield "vocab_size is not set, and plan counts the embedding: set it to the tokenizer's size"
    if run.recipe.family != "gpt":
        yield f"family={run.recipe.family} is not counted by plan: family=gpt is the same model where it has no Mamba"
    if args.optimizer != "adam":
        yield f"optimizer={args.optimizer} is not counted by plan, which knows adam's states"
    for name in (
        "multi_latent_attention",
        "mtp_num_layers",
        "experimental_attention_variant",
        "moe_latent_size",
        "attention_output_gate",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "fp32_residual_connection",
        "fine_grained_activation_offloading",
        "optimizer_cpu_offload",
    ):
        if getattr(args, name, None):
            yield f"{name}={getattr(args, name)} is not counted by plan: drop it to plan without"
    if run.layout.layers is None:
        yield "plan divides layers evenly among pipeline stages: drop the options that do otherwise"


def _moe_layers(args: Namespace) -> tuple[bool, ...]:
    if not args.num_experts:
        return (False,) * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return tuple(index % args.moe_layer_freq == 0 for index in range(args.num_layers))
    return tuple(bool(moe) for moe in args.moe_layer_freq)


def _bytes(args: Namespace, name: str) -> int:
    """Of an element of the optimizer's state; Megatron has made torch dtypes of the names."""
    return int(getattr(args, name).itemsize) if args.use_precision_aware_optimizer else 4


def _recompute(args: Namespace, frac: bool) -> Recompute:
    return Recompute(
        granularity=args.recompute_granularity or "none",
        modules=tuple(args.recompute_modules or ()) if args.recompute_granularity == "selective" else (),
        method=args.recompute_method or "uniform",
        layers=args.recompute_num_layers or 1,
        frac=frac,
    )


def plan_of(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    gpu: Device,
    gpus_per_node: int | None = None,
    network: float | None = None,
    assumed: Assumptions | None = None,
) -> Plan:
    """Plan a config for a number of nodes; needs no GPU.

    Args:
        config, overrides, nodes: as for `validate`.
        gpu: of all nodes.
        gpus_per_node: None for as many as its usual machine has.
        network: 1e9 bytes per second that a GPU sends to other NVLink domains, None for its usual machine's.
        assumed: shares of the peaks, None for the defaults.

    Raises:
        UserError: as `validate`, or planning does not count something in the config.
    """
    network = gpu.network_gb_per_second if network is None else network
    if not network > 0:
        raise UserError(f"network_gb_per_second={network} must be greater than 0")
    run = validate(config, overrides, nodes, gpu.gpus_per_node if gpus_per_node is None else gpus_per_node)
    shape, training = shape_of(run), training_of(run)
    gpu.tflops(training.fp8)
    return Plan(
        name=f"{config.stem} {run.recipe.connection}",
        shape=shape,
        training=training,
        layout=run.layout,
        gpu=gpu,
        network=network,
        assumed=assumed or Assumptions(),
        notes=tuple(run.unchecked),
    )

"""`megatron-fc prune`: a smaller model out of a trained one, by Minitron's scores on the run's own validation data.

ModelOpt's own Minitron takes Transformer Engine's layers alone, and norm slots that are TE's norms. What it does to a
model without touching the hidden size is to keep rows and columns of some weights, which is done here for any layer: a
site of a connection sees the residual stream, whose width stays, and is kept with its layer.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fc.checkpoints.location import find_checkpoint, refuse_existing
from megatron_fc.checkpoints.modelopt_state import refuse_state
from megatron_fc.compress.importance import Importance
from megatron_fc.compress.session import Session, session
from megatron_fc.errors import UserError, unknown
from megatron_fc.training.precision import has_dense_mlp
from megatron_fc.training.recipe import Recipe, load_recipe
from megatron_fc.training.setup import build, join_world, parse

PRUNABLE = ("num_layers", "num_attention_heads", "num_experts", "ffn_hidden_size", "moe_ffn_hidden_size")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_ONE_RANK = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True)
class Pruned:
    """What came of it.

    Attributes:
        original_loss: validation loss before.
        loss: and after, on the same batches.
        settings: the overrides with which the new checkpoint is trained.
    """

    original_loss: float
    loss: float
    settings: list[str]


def prune(
    config: Path, overrides: Sequence[str], export: Sequence[str], source: Path, target: Path, calibration_iters: int
) -> Pruned:
    """Write the checkpoint below `source`, pruned, to the folder `target`; every rank calls it and holds the model.

    Args:
        config: file of the run that the checkpoint belongs to.
        overrides: as for training it.
        export: `name=value`, the new size of each of PRUNABLE that is to shrink.
        source: folder of checkpoints, or one of them.
        target: folder that does not exist.
        calibration_iters: validation iterations that are scored; the losses are those of the `eval_iters` behind them.

    Raises:
        UserError: a size cannot be pruned or is none, the layout splits the model, the checkpoint is quantised, damaged
            or of another model, or the target exists.
    """
    sizes = _sizes(export)
    if calibration_iters < 1:
        raise UserError(f"--calibration-iters {calibration_iters}: the scores need at least one iteration")
    recipe = load_recipe(config, overrides)
    checkpoint = find_checkpoint(source)
    refuse_state(checkpoint, "prune the checkpoint that it was made of, and quantise the result")
    refuse_existing(target)
    join_world()
    args = parse(recipe)
    _refuse_layout(args, recipe, sizes)
    _refuse_sizes(args, sizes)
    settings = [f"{name}={value}" for name, value in (sizes | {"kv_channels": args.kv_channels}).items()]
    small = load_recipe(config, [*overrides, *settings])
    small_args = parse(small)
    with session(recipe, checkpoint) as run:
        losses = run.prepare_validation(calibration_iters)
        with Importance(run.model) as importance:
            run.validate(0, calibration_iters)
        original = run.validate(calibration_iters, losses)
        kept = _Kept(importance, args, small_args)
        _replace(run, kept, small, small_args)
        loss = run.validate(calibration_iters, losses)
        run.save(target)
    return Pruned(original, loss, settings)


def _sizes(export: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for word in export:
        name, _, value = word.partition("=")
        if name == "hidden_size":
            raise UserError(
                "hidden_size cannot be pruned: it would cut through the slots of the residual stream, on which the "
                "connections were trained; prune " + ", ".join(PRUNABLE)
            )
        if name not in PRUNABLE:
            raise UserError(unknown("--export", name, PRUNABLE))
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--export {word}: give a positive number, e.g. {name}=8")
        sizes[name] = int(value)
    return sizes


def _refuse_layout(args: Namespace, recipe: Recipe, sizes: dict[str, int]) -> None:
    for name in _ONE_RANK:
        if (value := getattr(args, name)) != 1:
            raise UserError(f"{name}={value}: pruning reads the whole model, set it to 1 (the checkpoint may be split)")
    if recipe.family != "gpt" or args.mtp_num_layers:
        raise UserError("pruning knows the layers of family=gpt without multi-token prediction: train such a model")
    if args.num_experts and args.moe_grouped_gemm:
        raise UserError("moe_grouped_gemm keeps all experts in one layer: set it to false to prune")
    if args.multi_latent_attention and "num_attention_heads" in sizes:
        raise UserError("num_attention_heads of multi-latent attention share one latent: leave them as they are")
    if args.qk_layernorm_over_heads and "num_attention_heads" in sizes:
        raise UserError("num_attention_heads share one norm with qk_layernorm_over_heads: leave them as they are")
    if args.num_experts and args.moe_layer_freq != 1 and "num_layers" in sizes:
        raise UserError(f"num_layers with moe_layer_freq={args.moe_layer_freq}: prune depth where all layers are alike")


def _refuse_sizes(args: Namespace, sizes: dict[str, int]) -> None:
    if "ffn_hidden_size" in sizes and not has_dense_mlp(args):
        raise UserError(
            f"--export ffn_hidden_size={sizes['ffn_hidden_size']}: all layers of this model have experts, which are "
            f"moe_ffn_hidden_size={args.moe_ffn_hidden_size} wide: prune that"
        )
    for name, value in sizes.items():
        now = getattr(args, name)
        if now is None:
            raise UserError(f"--export {name}={value}: this model has no {name}")
        if value > now:
            raise UserError(f"--export {name}={value}: the model has {now}, pruning makes it smaller")
    if sizes.get("num_experts", args.moe_router_topk) < args.moe_router_topk:
        raise UserError(f"--export num_experts={sizes['num_experts']}: a token goes to {args.moe_router_topk} experts")
    groups = args.num_query_groups if args.group_query_attention else 1
    if sizes.get("num_attention_heads", groups) % groups:
        raise UserError(
            f"--export num_attention_heads={sizes['num_attention_heads']}: give a multiple of num_query_groups={groups}"
        )


class _Kept:
    """Which parts stay, in their old order, and how a tensor of the small model is cut out of the old one's."""

    def __init__(self, importance: Importance, args: Namespace, small: Namespace) -> None:
        self._importance, self._args, self._small = importance, args, small
        self._layers = _best(importance.layers, small.num_layers)
        self._groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads

    def cut(self, old: dict[str, Tensor], name: str) -> Tensor:
        """Return the tensor `name` of the small model.

        Args:
            old: the old model's tensors by name.
        """
        match = _LAYER.fullmatch(name)
        if match is None:
            return old[name]
        layer, rest = int(self._layers[int(match[1])]), match[2]
        if expert := _EXPERT.fullmatch(rest):
            number = int(self._experts(layer)[int(expert[1])])
            tensor = old[f"decoder.layers.{layer}.mlp.experts.local_experts.{number}.{expert[2]}"]
            return self._cut_mlp(tensor, expert[2], (layer, number), self._small.moe_ffn_hidden_size)
        tensor = old[f"decoder.layers.{layer}.{rest}"]
        if rest.startswith("mlp.linear_fc"):
            return self._cut_mlp(tensor, rest.removeprefix("mlp."), (layer, None), self._small.ffn_hidden_size)
        if rest in ("mlp.router.weight", "mlp.router.bias", "mlp.router.expert_bias"):
            return tensor[self._experts(layer)]
        if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            return self._cut_qkv(tensor, layer)
        if rest == "self_attention.linear_proj.weight":
            heads = tensor.unflatten(-1, (self._args.num_attention_heads, -1))
            return heads[:, self._heads(layer)].flatten(1)
        return tensor

    def _experts(self, layer: int) -> Tensor:
        return _best(self._importance.experts[layer], self._small.num_experts)

    def _heads(self, layer: int) -> Tensor:
        """Heads that stay: the best of each query group, or of all where every head has its own key and value."""
        scores = self._importance.heads[layer]
        if self._groups == len(scores):
            return _best(scores, self._small.num_attention_heads)
        per_group = len(scores) // self._groups
        kept = [_best(group, self._small.num_attention_heads // self._groups) for group in scores.split(per_group)]
        return torch.cat([heads + group * per_group for group, heads in enumerate(kept)])

    def _cut_qkv(self, tensor: Tensor, layer: int) -> Tensor:
        """Rows lie by query group: the group's queries, then its key and its value."""
        heads = self._heads(layer)
        queries = self._args.num_attention_heads // self._groups
        parts = tensor.unflatten(0, (self._groups, queries + 2, self._args.kv_channels))
        if queries == 1:
            return parts[heads].flatten(0, 2)
        own = torch.stack([group % queries for group in heads.chunk(self._groups)])
        key_value = torch.tensor([[queries, queries + 1]]).expand(self._groups, 2)
        rows = torch.cat([own, key_value], dim=1)
        return parts[torch.arange(self._groups)[:, None], rows].flatten(0, 2)

    def _cut_mlp(self, tensor: Tensor, name: str, site: tuple[int, int | None], size: int) -> Tensor:
        scores = self._importance.neurons[site]
        if name in ("linear_fc1.weight", "linear_fc1.bias"):
            # With a gate, its rows come first and the values' behind them.
            return tensor.unflatten(0, (-1, len(scores)))[:, _best(scores, size)].flatten(0, 1)
        if name == "linear_fc2.weight":
            return tensor[:, _best(scores, size)]
        return tensor  # Transformer Engine's norm inside linear_fc1 and its FP8 state have no neurons


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, in ascending order."""
    return scores.topk(count).indices.sort().values


def _replace(run: Session, kept: _Kept, small: Recipe, small_args: Namespace) -> None:
    """Put the small model in the place of the session's."""
    from megatron.core.utils import unwrap_model

    small_args.padded_vocab_size = run.args.padded_vocab_size
    chunks = build(small_args, small)
    old = {name: tensor for name, tensor in run.model.state_dict().items() if isinstance(tensor, Tensor)}
    model = unwrap_model(chunks)[0]
    wanted = [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)]
    model.load_state_dict({name: kept.cut(old, name) for name in wanted}, strict=False)
    # The arguments in the new checkpoint are those of its model.
    for name in (*PRUNABLE, "kv_channels", "num_query_groups"):
        setattr(run.args, name, getattr(small_args, name))
    run.chunks = chunks

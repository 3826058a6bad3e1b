"""A config as Megatron validates it for a number of nodes, on a machine that may have no GPU."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fc.errors import UserError
from megatron_fc.megatron.refusals import refuse_with_connection
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.stages import Split, parsed
from megatron_fc.preflight.batch_schedule import batch_sizes, steps_and_samples
from megatron_fc.training.machine import has_transformer_engine
from megatron_fc.training.recipe import Recipe, load_recipe
from megatron_fc.training.rehearsal import rehearse_model, rehearse_schedule
from megatron_fc.training.setup import parse

# Speed alone; Megatron refuses them where it finds no Transformer Engine, before it checks the rest.
_TE_FUSIONS = ("apply_rope_fusion", "moe_permute_fusion")
# Of a machine's environment: Megatron wants 1 of it under tensor parallelism, and anything else with FSDP.
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_NAMES_TE = re.compile(r"\bTE\b|(?i:transformer[- _]engine)")


@dataclass(frozen=True)
class Validated:
    """A config that Megatron has checked in a world of some size.

    Attributes:
        recipe: the config.
        args: Megatron's arguments, with padded_vocab_size where vocab_size is set.
        layout: sizes of all kinds of parallelism.
        unchecked: what this machine could not check, in words.
    """

    recipe: Recipe
    args: Namespace
    layout: Layout
    unchecked: list[str]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_and_samples(self.args)[0]

    @property
    def tokens(self) -> int:
        """That are trained in all."""
        return int(steps_and_samples(self.args)[1] * self.args.seq_length)

    @property
    def target_tokens(self) -> int:
        """That the config asks for."""
        return int(self.args.train_samples * self.args.seq_length) if self.args.train_samples else self.tokens


def validate(config: Path, overrides: Sequence[str], nodes: int, gpus_per_node: int) -> Validated:
    """Let Megatron check a config for a number of nodes; needs no GPU.

    Args:
        config: the YAML file.
        overrides: as in `load_recipe`.
        nodes: number of nodes.
        gpus_per_node: ranks per node.

    Raises:
        UserError: the layout is impossible (with the possible ones), or Megatron refuses arguments.
    """
    recipe = load_recipe(config, overrides, elsewhere=True)
    layouts: list[Layout] = []

    def check(args: Namespace) -> None:
        if recipe.connection is not None:
            # A run that says so is one for the CPU lane.
            refuse_with_connection(args, recipe.connection, on_gpu=args.distributed_backend != "gloo")
        if args.use_megatron_fsdp or args.use_torch_fsdp2:
            os.environ.pop(_CONNECTIONS, None)
        layouts.append(layout_of(args, nodes, gpus_per_node))
        refuse_impossible(args, layouts[0])

    with _world_of(max(nodes * gpus_per_node, 1)):
        args = parse(recipe, check)
    rehearse_schedule(args)
    set_padded_vocabulary(args)
    return Validated(recipe, args, layouts[0], _check_model(args, recipe))


@contextmanager
def _world_of(size: int) -> Iterator[None]:
    """Let Megatron take this process for the first rank of a world."""
    names = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", _CONNECTIONS: "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def layout_of(args: Namespace, nodes: int, gpus_per_node: int) -> Layout:
    """Return the layout that arguments ask for, with their last batch size, whether Megatron has validated them or not.

    Raises:
        UserError: something that a layout needs is not set.
    """
    if not (args.train_samples or args.train_iters):
        raise UserError("the run has no end: set train_samples or train_iters")
    for name in ("micro_batch_size", "global_batch_size", "num_attention_heads"):
        if getattr(args, name) is None and not (name == "global_batch_size" and args.step_batch_size_schedule):
            raise UserError(f"{name} is not set: set it")
    per_stage = args.num_layers_per_virtual_pipeline_stage
    stages = args.num_virtual_stages_per_pipeline_rank or 1
    if per_stage and args.num_layers:
        counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        stages = max((args.num_layers + counted) // (per_stage * args.pipeline_model_parallel_size), 1)
    split = split_of(args)
    if split.stages and len(split.stages) % args.pipeline_model_parallel_size == 0:
        stages = len(split.stages) // args.pipeline_model_parallel_size
    return Layout(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual_pipeline=stages,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        micro_batch=args.micro_batch_size,
        global_batch=batch_sizes(args)[-1][1],
        heads=args.num_attention_heads,
        layers=None if args.hybrid_layer_pattern else args.num_layers,
        experts=args.num_experts or 0,
        split=split,
    )


def split_of(args: Namespace) -> Split:
    """How arguments divide the layers among stages.

    Raises:
        UserError: a string has letters that Megatron does not know.
    """
    text = args.pipeline_model_parallel_layout
    try:
        stages = parsed(str(text)) if text else ()
    except ValueError as error:
        raise UserError(f"pipeline_model_parallel_layout={text} {error}") from None
    return Split(
        with_embedding=bool(args.account_for_embedding_in_pipeline_split),
        with_loss=bool(args.account_for_loss_in_pipeline_split),
        first=args.decoder_first_pipeline_num_layers,
        last=args.decoder_last_pipeline_num_layers,
        stages=stages,
    )


def refuse_impossible(args: Namespace, layout: Layout) -> None:
    """Check a layout with every batch size of the run.

    Raises:
        UserError: it is impossible.
    """
    for _, batch in batch_sizes(args):
        replace(layout, global_batch=batch).refuse_impossible()


def set_padded_vocabulary(args: Namespace) -> None:
    """As Megatron does when it has read the tokenizer, which need not be on this machine."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if args.padded_vocab_size is None and args.vocab_size is not None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )


def _check_model(args: Namespace, recipe: Recipe) -> list[str]:
    """Let Megatron check its model config; returns what it could not check without Transformer Engine."""
    if not has_transformer_engine():
        for name in _TE_FUSIONS:
            setattr(args, name, False)
    try:
        rehearse_model(args, recipe, elsewhere=True)
    except (UserError, ImportError) as error:
        said = " ".join(str(error).split()).removeprefix("Megatron refuses the model: ")
        if not has_transformer_engine() and _NAMES_TE.search(said):
            return [f"Megatron's model config was not checked to its end, which needs Transformer Engine here: {said}"]
        raise
    return []

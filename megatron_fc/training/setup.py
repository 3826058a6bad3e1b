"""From a recipe to what Megatron trains: the world of ranks, its validated arguments, the model's configuration."""

import contextlib
import io
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import connection_from_args
from megatron_fc.megatron.model_config import prepare
from megatron_fc.megatron.norm_options import MEGATRON_NORMS, NormOptions, norms_from_args
from megatron_fc.training.counts import refuse_two_units, refuse_wrong_counts
from megatron_fc.training.megatron_arguments import add_run_args
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.refusal import refusals_named
from megatron_fc.training.unused_options import refuse_unused_options


def join_world() -> None:
    """Become a world of one rank, unless a launcher has set this process's rank."""
    if "RANK" in os.environ:
        return
    # Port 0 is whichever is free when the store opens it: one chosen here may be another's by then.
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in alone.items()})


def parse(recipe: Recipe, check: Callable[[Namespace], None] | None = None) -> Namespace:
    """Let Megatron parse and validate a recipe's arguments; what its assertions say becomes one sentence.

    Args:
        recipe: the run.
        check: called with the arguments before Megatron validates them.

    Raises:
        UserError: they are refused.
    """
    from megatron.training.arguments import parse_args, validate_args

    # Megatron reads the process's arguments.
    program, sys.argv = sys.argv, ["megatron-fc", *recipe.argv]
    try:
        with refusals_named("the arguments"), contextlib.redirect_stdout(io.StringIO()) as said:
            args = parse_args(extra_args_provider=add_run_args)
            args.connection_parameters_first = True  # `model_config` arranges it
            refuse_unused_options(args)
            refuse_wrong_counts(args)
            connection_from_args(args)
            norms_from_args(args)
            if check is not None:
                check(args)
            refuse_two_units(args)
            validate_args(args, {})
    except SystemExit:  # Megatron's way out of some arguments of earlier releases, with code 0
        raise UserError(f"Megatron refuses the arguments: {said.getvalue().strip().splitlines()[-1]}") from None
    finally:
        sys.argv = program
    return args


def written_folders(args: Namespace, run_dir: Path) -> dict[Path, str]:
    """Return the folders that all ranks write, each with the setting that names it."""
    folders = {run_dir: "run_dir"}
    for name in ("save", "tensorboard_dir"):
        if (value := getattr(args, name)) and not Path(value).is_relative_to(run_dir):
            folders[Path(value)] = name
    return folders


def model_config(args: Namespace, recipe: Recipe) -> Any:
    """Return Megatron's configuration of the recipe's model, its connections included."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    from megatron_fc.megatron.specs.norms import plain_spec

    model: Any
    norms = norms_from_args(args)
    if recipe.family == "hybrid":
        model = hybrid_config_from_args(args)
        model.hybrid_stack_spec = _hybrid_stack(args, norms, recipe.connection)
    else:
        model = gpt_config_from_args(args)
        if recipe.connection is not None:
            model.transformer_layer_spec = _gpt_spec(args, norms, recipe.connection)
        elif norms != MEGATRON_NORMS:
            model.transformer_layer_spec = partial(plain_spec, norms)
    if recipe.connection is not None:
        prepare(model, recipe.connection, args)
    return model


def build(args: Namespace, recipe: Recipe, *, in_wrapper: bool = True) -> list[Any]:
    """Build this rank's chunks of a recipe's model in Megatron's world, without optimizer and its wrapper.

    Args:
        args: Megatron's, validated.
        recipe: the run.
        in_wrapper: put a half-precision model into Megatron's wrapper, which casts what goes in and comes out.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module

    config = model_config(args, recipe)
    with refusals_named("the model"):
        chunks: list[Any] = config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            wrap_with_ddp=False,
            mixed_precision_wrapper=Float16Module if in_wrapper else None,
        )
    return chunks


def _gpt_spec(args: Namespace, norms: NormOptions, connection: ConnectionConfig) -> Any:
    from megatron_fc.megatron.specs import gpt_spec

    if args.mtp_num_layers:
        raise UserError(
            "multi-token prediction would keep plain residuals in a GPTModel: set model.family=hybrid with a "
            "pattern like '*E*E/*E', whose MTP layers are connected too"
        )
    return gpt_spec(connection, norms)


def _hybrid_stack(args: Namespace, norms: NormOptions, connection: ConnectionConfig | None) -> Any:
    from megatron_fc.megatron.hybrid import hybrid_stack
    from megatron_fc.megatron.specs import connect
    from megatron_fc.megatron.specs.norms import place_norms

    stack = place_norms(hybrid_stack(args.transformer_impl == "transformer_engine", args.qk_layernorm), norms)
    return stack if connection is None else connect(stack, connection)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep Megatron's report of its arguments and steps off the terminal, and end its world."""
    with ended_world(), quiet():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's report of its arguments and steps off the terminal."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def ended_world() -> Iterator[None]:
    """End the world of ranks that is joined in the body, should one be, when that ends."""
    is_older = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not is_older:
            torch.distributed.destroy_process_group()

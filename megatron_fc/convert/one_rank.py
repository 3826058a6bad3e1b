"""A run's model on one rank without its data, whatever layout it is trained in: checkpoints do not depend on that."""

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from megatron_fc.errors import UserError
from megatron_fc.training.recipe import Recipe, load_recipe
from megatron_fc.training.setup import join_world, parse, silence

_SIZES = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context")
ON_ONE_RANK = [f"{kind}_parallel_size=1" for kind in _SIZES]
ON_ONE_RANK += ["sequence_parallel=false", "num_layers_per_virtual_pipeline_stage=null"]
ON_ONE_RANK += ["num_virtual_stages_per_pipeline_rank=null", "pipeline_model_parallel_layout=null"]
_WITHOUT_DATA = [
    "mock_data=true",
    "data_path=null",
    *(f"{split}_data_path=null" for split in ("train", "valid", "test")),
]
_WITHOUT_DATA += ["eval_iters=1", "full_validation=false", "multiple_validation_sets=false"]
_FP32 = ["precision=null", "bf16=false", "fp16=false"]


def recipe_on_one_rank(config: Path, overrides: Sequence[str], fp32: bool = False) -> Recipe:
    """Return a config's recipe for one rank, on mock data.

    Args:
        config, overrides: as for training.
        fp32: the model is to compute in fp32, whatever the run does.

    Raises:
        UserError: as `load_recipe`, or a launcher has started several ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        raise UserError(f"convert runs in one process, and a launcher started {ranks}: start it by itself")
    return load_recipe(config, [*overrides, *ON_ONE_RANK, *_WITHOUT_DATA, *(_FP32 if fp32 else [])])


@contextmanager
def one_rank(recipe: Recipe) -> Iterator[Namespace]:
    """Make a world of this process, which Megatron's functions for checkpoints ask for; gives the parsed arguments."""
    with silence():
        join_world()
        args = parse(recipe)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
        yield args

"""Requirements of a recipe: what it needs of nodes and file systems."""

import os
from argparse import Namespace
from pathlib import Path

from megatron_fc.preflight.disk_space import disk_space_of
from megatron_fc.preflight.nodes import Requirements
from megatron_fc.preflight.packages import is_on_devices, refuse_unreadable_optimizer
from megatron_fc.preflight.validation import layout_of, refuse_impossible
from megatron_fc.training.data_files import blends, data_files, index_folder, refuse_damaged_files
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.rehearsal import rehearse
from megatron_fc.training.setup import parse, written_folders


def requirements_of(recipe: Recipe) -> Requirements:
    """Let Megatron check the recipe's arguments for this world; return what the run needs.

    Raises:
        UserError: they are refused.
    """
    args = parse(recipe, _refuse_impossible)
    rehearse(args, recipe)
    refuse_damaged_files(args, remember=True)
    refuse_unreadable_optimizer(recipe, args)
    return Requirements(
        folders=written_folders(args, recipe.run_dir),
        files=data_files(args),
        indexes=_indexes(args),
        on_devices=is_on_devices(recipe),
        disk_space=disk_space_of(recipe, args),
    )


def _refuse_impossible(args: Namespace) -> None:
    """Check the layout of the ranks that are really there."""
    ranks = int(os.environ["WORLD_SIZE"])
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    refuse_impossible(args, layout_of(args, max(ranks // per_node, 1), min(per_node, ranks)))


def _indexes(args: Namespace) -> dict[Path, str]:
    """Where Megatron writes indexes of the data at a run's first start; those that are there need only be read."""
    if args.data_cache_path:
        folders = {Path(args.data_cache_path): f"correct data_cache_path={args.data_cache_path}"}
    else:
        prefixes = [prefix for blend in blends(args) for prefix in blend.prefixes]
        remedy = "set data_cache_path to a folder that all nodes share"
        folders = {index_folder(args, prefix): remedy for prefix in prefixes}
    return {folder: remedy for folder, remedy in folders.items() if not any(folder.glob("*-shuffle_index.npy"))}

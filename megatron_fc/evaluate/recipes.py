"""The recipe of a run that is evaluated: as it was trained, without its training data."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fc.training.recipe import Recipe, load_recipe

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
_WITHOUT_DATA = [*(f"{name}=null" for name in (*_DATA, "per_split_data_args_path")), "mock_data=true"]


def recipe_without_data(config: Path, overrides: Sequence[str]) -> Recipe:
    """Read a config as `load_recipe` does; the data that it names need not be here."""
    return load_recipe(config, [*overrides, *_WITHOUT_DATA])

"""`megatron-fc data index`: the order of a run's samples, made before its ranks start.

Without it the first rank of a run makes it while all others wait.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_fc.convert.one_rank import ON_ONE_RANK, one_rank
from megatron_fc.errors import UserError
from megatron_fc.preflight.batch_schedule import steps_and_samples
from megatron_fc.training.batches import data_config
from megatron_fc.training.data_files import OF_A_PREPARED_INDEX, repetition
from megatron_fc.training.recipe import load_recipe
from megatron_fc.training.token_data import TokenDataset


def index(config: Path, overrides: Sequence[str], *, report: Callable[[str], None]) -> None:
    """Fill a run's `data_cache_path`, in one process and without a model.

    Args:
        config, overrides: as for training.
        report: gets a line of text per set.

    Raises:
        UserError: as for training, or there is no `data_cache_path`.
    """
    # What is made here is not there yet.
    built = [f"{name}=false" for name in OF_A_PREPARED_INDEX]
    recipe = load_recipe(config, [*overrides, *ON_ONE_RANK, *built])
    with one_rank(recipe) as args:
        if said := repetition(args):
            report(said)
        if args.data_cache_path is None:
            raise UserError("data_cache_path is not set: name a folder that all nodes of the run see")
        from megatron.training.global_vars import set_args
        from megatron.training.training import get_train_valid_test_num_samples

        set_args(args)
        args.train_iters, _ = steps_and_samples(args)  # of which Megatron's numbers of validation samples come
        began = time.monotonic()
        sets = BlendedMegatronDatasetBuilder(
            TokenDataset, get_train_valid_test_num_samples(), lambda: True, data_config(args)
        ).build()
    for name, data in zip(("train", "valid", "test"), sets, strict=True):
        if data is not None:
            report(f"{name}: {len(data):,} samples")
    size = sum(file.stat().st_size for file in Path(args.data_cache_path).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report(f"{time.monotonic() - began:.1f} s, peak memory {peak:.2f} GiB, {size:,} bytes in {args.data_cache_path}")

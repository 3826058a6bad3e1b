"""Two functions of Megatron's, wrapped so that a resumed run goes on exactly, and with the settings that it has now.

Megatron 0.19 does two things otherwise, in functions that take no options:

* Its data loaders draw their seeds from torch's generator, after that was restored from a checkpoint: with every resume
  the generator moves on, and dropout with it.
* It finds the parameter groups of a saved optimizer by values that a run may change, the learning rates among them, and
  takes over what was saved: a run could not go on with another rate, and would ignore other betas.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What a config sets of a parameter group. All else is state, as the step of a fused Adam.
_SETTINGS = ("max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps", "momentum")


@contextmanager
def exact_resume(args: Namespace) -> Iterator[None]:
    """Wrap both functions of Megatron's while the body runs.

    Args:
        args: Megatron's; with `use_checkpoint_opt_param_scheduler` the saved groups stay as they are.
    """
    from megatron.training import training

    build_iterators, get_optimizer = training.build_train_valid_test_data_iterators, training.get_megatron_optimizer
    training.build_train_valid_test_data_iterators = _without_drawing(build_iterators)
    if not args.use_checkpoint_opt_param_scheduler:
        training.get_megatron_optimizer = _with_own_settings(get_optimizer)
    try:
        yield
    finally:
        training.build_train_valid_test_data_iterators = build_iterators
        training.get_megatron_optimizer = get_optimizer


def _without_drawing(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):  # the loaders draw on the CPU
            return build(*args, **kwargs)

    return wrapped


def _with_own_settings(get: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        optimizer = get(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.load_state_dict = functools.partial(_load, part, part.load_state_dict)
        return optimizer

    return wrapped


def _load(optimizer: Any, load: Callable[[dict[str, Any]], None], state: dict[str, Any]) -> None:
    saved = state.get("optimizer", state)
    if "param_groups" in saved:  # not on a rank without parameters
        saved["param_groups"] = with_settings(saved["param_groups"], optimizer.param_groups)
    load(state)


def with_settings(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an optimizer's saved parameter groups with the settings of this run's groups.

    A group without its like among this run's, or with several, stays as it is; Megatron then finds its like by all
    values, or refuses.

    Args:
        saved: in any order.
        own: of this run.
    """
    likes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for group in own:
        likes.setdefault(_name(group), []).append(group)
    return [_updated(group, likes.get(_name(group), [])) for group in saved]


def _updated(group: dict[str, Any], likes: list[dict[str, Any]]) -> dict[str, Any]:
    if len(likes) != 1:
        return group
    return group | {key: likes[0][key] for key in _SETTINGS if key in group and key in likes[0]}


def _name(group: dict[str, Any]) -> tuple[Any, ...]:
    """What Megatron tells groups apart by, without what a run may change, and whether it has rates of its own."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    keys = [key for key in param_group_identifier_keys if key not in _SETTINGS]
    return group.get("default_config"), *(group.get(key, group.get(f"pre_{key}")) for key in keys)

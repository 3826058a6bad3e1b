"""The lm-evaluation-harness's own command line, in which the name megatron_fc stands for a checkpoint of ours.

    megatron-fc lm-eval run --model megatron_fc --model_args checkpoint=FOLDER config=FILE [key=value ...] --tasks ...

Megatron is loaded when that name is asked for, and with it the CPU lane, which redirects every torch call of a process:
the harness's other models are left as they are.
"""

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  the harness registers its own models only where there is none yet
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.training import cpu_lane

if TYPE_CHECKING:
    from megatron_fc.evaluate.harness import HarnessModel

_OPEN = contextlib.ExitStack()  # what the harness has made of words; it closes nothing


def run_command_line() -> None:
    """Run the harness's own command line, of the words in `sys.argv`.

    Raises:
        UserError: the harness itself refuses them, an unknown task say.
    """
    from lm_eval.__main__ import cli_evaluate

    with _OPEN:
        try:
            cli_evaluate()
        except ValueError as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if not str(frame.f_globals.get("__name__")).startswith("lm_eval."):
                raise
            raise UserError(f"the harness refuses this: {' '.join(str(error).split())}") from error


@register_model("megatron_fc")
class _Checkpoint(LM):
    """What the harness asks to make a model of words."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "HarnessModel":
        return open_model(simple_parse_args_string(arg_string), additional_config or {})

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        return open_model(arg_dict, additional_config or {})


def open_model(given: dict[str, Any], settings: dict[str, Any]) -> "HarnessModel":
    """Load a checkpoint. On ranks that follow this ends with the leader, by SystemExit.

    Args:
        given: `checkpoint`, `config`, and overrides of it.
        settings: the harness's; of these `batch_size` counts sequences of full length.

    Raises:
        UserError: a word is missing, or the checkpoint cannot be evaluated.
    """
    words = dict(given)
    checkpoint, config = (_path(words, name) for name in ("checkpoint", "config"))
    batch_size = _batch_size(settings.get("batch_size"))
    cpu_lane.install()
    from megatron_fc.evaluate.answers import Answers
    from megatron_fc.evaluate.engine import open_engine
    from megatron_fc.evaluate.harness import HarnessModel
    from megatron_fc.evaluate.questions import Questions
    from megatron_fc.evaluate.recipes import recipe_without_data

    recipe = recipe_without_data(config, [f"{name}={_yaml(value)}" for name, value in words.items()])
    engine = _OPEN.enter_context(open_engine(recipe, find_checkpoint(checkpoint), batch_size))
    if not engine.leads:
        engine.follow()
        raise SystemExit(0)
    return HarnessModel(Questions(engine, Answers(None, {})))


def _path(words: dict[str, Any], name: str) -> Path:
    if name not in words:
        raise UserError(
            f"--model_args lacks {name}=...: give checkpoint=FOLDER config=FILE, and overrides as for train"
        )
    return Path(str(words.pop(name))).expanduser()


def _batch_size(given: Any) -> int | None:
    if given in (None, "auto"):
        return None
    if not (str(given).isdecimal() and int(given) > 0):
        raise UserError(f"--batch_size {given}: give a number from 1 on, or auto for the run's micro-batch")
    return int(given)


def _yaml(value: Any) -> str:
    """A value as an override's text; the harness has read it as Python's."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)

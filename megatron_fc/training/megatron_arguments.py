"""Megatron's own arguments, as its parser knows them: settings become flags, flags are checked."""

import argparse
import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import add_connection_args, is_connection_argument
from megatron_fc.training.repetitions import add_repetition_args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"Megatron's arguments: {message}")


class MegatronArguments:
    """What Megatron's own parser knows of its arguments."""

    def __init__(self) -> None:
        from megatron.training.arguments import add_megatron_arguments, tuple_type

        # Abbreviations would let a typo through as another argument.
        self._parser = add_run_args(add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False)))
        self._actions = {
            option.removeprefix("--").replace("-", "_"): (option, action)
            for action in self._parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }
        self._tuple = tuple_type

    def names(self) -> set[str]:
        return {name for name in self._actions if not is_connection_argument(name)}

    def default(self, dest: str) -> Any:
        """The value of an attribute of the arguments where nothing sets it."""
        return self._parser.get_default(dest)

    def group(self, title: str) -> list[str]:
        """The attributes of one of the groups that `--help` shows, those that all groups share left out."""
        groups = [group for group in self._parser._action_groups if group.title == title]
        return sorted({action.dest for group in groups for action in group._group_actions})

    def refuse_connection_flags(self, flags: Sequence[str]) -> None:
        """Check that no flag behind `--` speaks of the connection, which the section connections alone decides.

        Raises:
            UserError: names the flag, and the setting to write in its place.
        """
        for at, word in enumerate(flags):
            option, equals, value = word.partition("=")
            action = self._parser._option_string_actions.get(option)
            if action is None or not is_connection_argument(action.dest):
                continue
            kind, _, setting = action.dest.partition("_")
            if action.dest == "from_residual":
                setting = action.dest
            elif setting == "slots":
                setting = "rate"
            if setting == "dynamic":
                letter = "s" if option.startswith("--no-") else "d"
                setting, value = "connection", f"{letter}{'fc' if kind == 'frac' else 'hc'}"
            elif action.nargs == 0:
                value = str(not option.startswith("--no-")).lower()
            elif not equals:
                value = flags[at + 1] if at + 1 < len(flags) else "..."
            if action.dest == "manifold_fractions":
                setting, value = "connection", "mhc" if value == "1" else "mfc"
            raise UserError(
                f"{option} behind -- would be a second source of the connection: write {setting}={value} before the --"
            )

    def flags(self, settings: dict[str, Any]) -> list[str]:
        """Write settings as flags; None and False leave an argument unset, a list becomes several values."""
        return [word for name, value in settings.items() for word in self._flag(name, value)]

    def _flag(self, name: str, value: Any) -> list[str]:
        option, action = self._actions[name]
        takes_value = action.nargs != 0
        if value is None:
            return []
        if not takes_value:
            if not isinstance(value, bool):
                raise UserError(f"{name} is a switch: set it to true or false, not {value!r}")
            negative = f"--no-{option.removeprefix('--')}"
            if not value and negative in action.option_strings:
                return [negative]
            return [option] if value else []
        if isinstance(value, bool):
            raise UserError(f"{name} takes a value, not {str(value).lower()}")
        if isinstance(value, (list, tuple)):
            if action.nargs is not None:
                return [option, *map(str, value)]
            # Megatron wants window_size in round brackets, others as moe_layer_freq in square ones; none with blanks.
            left, right = "()" if action.type is self._tuple else "[]"
            value = f"{left}{','.join(map(str, value))}{right}"
        return [option, str(value)]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self._parser.parse_known_args(list(argv))
        flags = [word.split("=")[0] for word in rest if word.startswith("--")]
        if flags:
            near = difflib.get_close_matches(flags[0], self._parser._option_string_actions, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown Megatron flag {flags[0]}{hint}")
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r} among the Megatron flags")
        return args


def add_run_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that a run has beside Megatron's: those of connections and norms, and of repetitions."""
    return add_repetition_args(add_connection_args(parser))


@cache
def megatron_arguments() -> MegatronArguments:
    """A process needs one: to make it takes longer than to use it."""
    return MegatronArguments()

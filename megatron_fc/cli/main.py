"""The command `megatron-fc`."""

import argparse
import os
import signal
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from megatron_fc.cli import COMMANDS
from megatron_fc.errors import NodeError, UserError, unknown
from megatron_fc.extras import remedy


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for input that the user can correct."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, extra = _split_at_dashes(words)
    parser, names = _parser()
    words = _joined(words, names)
    # argparse takes the overrides in one piece only; those behind an option are handed back.
    args, behind = parser.parse_known_args(words)
    if option := next((word for word in behind if word.startswith("--")), None):
        parser.error(unknown(f"option of {args.command}", option.split("=")[0], _options(parser, words)))
    if any(word.startswith("-") for word in behind) or (behind and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    if extra and args.command != "train":
        parser.error("only `train` takes Megatron flags after --")
    if behind:
        args.overrides += behind
    args.command_line, args.megatron_flags, args.is_process = words, extra, argv is None
    for name, value in vars(args).items():
        setattr(args, name, _at_home(value))
    _quieten()
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"megatron-fc: {error}", file=sys.stderr)
        return 2
    except NodeError as error:
        print(f"megatron-fc: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except ModuleNotFoundError as error:
        if (missing := remedy(error)) is None:
            raise
        print(f"megatron-fc: {args.command} needs {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"megatron-fc: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _joined(words: list[str], names: Container[str]) -> list[str]:
    """`evaluate fetch` is a command of its own, whose name is two words."""
    two = " ".join(words[:2])
    return [two, *words[2:]] if two in names else words


def _at_home(value: Any) -> Any:
    """A path completed where it begins with ~, which a shell leaves alone behind the = of an option."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _parser() -> tuple[argparse.ArgumentParser, Container[str]]:
    """The parser, and the names of the commands."""
    parser = argparse.ArgumentParser(
        prog="megatron-fc", description="Frac-Connections (arXiv 2503.14125) for Megatron-LM.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser, commands.choices


def _options(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Options of the command that the words name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            at, word = next((at, word) for at, word in enumerate(words) if word in action.choices)
            return _options(action.choices[word], words[at + 1 :])
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _quieten() -> None:
    """Keep libraries' warnings off the terminal: that Apex or TE is missing is said once, by our own notes.

    On the CPU lane torch's functions are called by the lane, and their warnings are of its module.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|megatron_fc\.training\.cpu_lane)\b")
    for talkative in ("torch.utils.cpp_extension", "matplotlib"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())

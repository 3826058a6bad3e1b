"""Refusals of Megatron's as one sentence: what it asserts and raises before the first step is over.

A refusal is an exception that a statement of Megatron's raises, or another package's as the error of a value, or a
division by a setting that is 0. All else, what torch or the system reports and what goes wrong in this project, stays
the error that it is.
"""

import ast
import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_fc.callbacks import Callback
from megatron_fc.errors import UserError

_HERE = Path(__file__).parents[1]
_WRONG_VALUE = (AssertionError, ValueError, NotImplementedError)
_DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)


class Refusals(Callback):
    """Names in one sentence what Megatron refuses in a run's first step or before it; the log has the traceback."""

    def __init__(self) -> None:
        self._has_stepped = False

    def after_step(self, iteration: int) -> None:
        self._has_stepped = True

    def failed(self, error: BaseException) -> BaseException:
        sentence = None if self._has_stepped else refusal(error)
        if sentence is None:
            return error
        with suppress(OSError):  # the log may be on a full disk
            traceback.print_exception(error)
        return UserError(f"Megatron refuses this run: {sentence}")


@contextmanager
def refusals_named(what: str) -> Iterator[None]:
    """Raise what Megatron refuses in the body as a UserError.

    Args:
        what: it refuses, e.g. "the arguments".
    """
    try:
        yield
    except Exception as error:
        sentence = refusal(error)
        if sentence is None:
            raise
        raise UserError(f"Megatron refuses {what}: {sentence}") from error


def refusal(error: BaseException) -> str | None:
    """Return what Megatron says to a run's settings, None where an error is no refusal, or a sentence already."""
    if isinstance(error, UserError) or not isinstance(error, Exception) or error.__traceback__ is None:
        return None
    passed = list(traceback.walk_tb(error.__traceback__))
    frame, line = passed[-1]
    if any(f.f_code.co_name == "build_tokenizer" and _is_megatrons(f) for f, _ in passed):
        return f"no tokenizer can be made of tokenizer_type, tokenizer_model and what they need, {_said(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed: install it, or drop the setting that needs it"
    statement = _statement(frame.f_code.co_filename, line)
    if statement is None or Path(frame.f_code.co_filename).is_relative_to(_HERE):
        return None
    if isinstance(error, ZeroDivisionError) and _is_megatrons(frame):
        return _zero(statement, frame)
    is_said = isinstance(statement, (ast.Raise, ast.Assert))
    if not is_said or not (_is_megatrons(frame) or isinstance(error, _WRONG_VALUE)):
        return None
    if isinstance(statement, ast.Assert) and not str(error):
        return _condition(statement, frame, line)
    return _said(error) if str(error) else f"{type(error).__name__} ({_place(frame, line)})"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_megatrons(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "megatron"


@functools.cache
def _statements(file: str) -> list[ast.stmt]:
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _statement(file: str, line: int) -> ast.stmt | None:
    """The innermost statement of a line; of a compound one its head."""
    over = [s for s in _statements(file) if s.lineno <= line <= (s.end_lineno or s.lineno)]
    return max(over, key=lambda s: s.lineno, default=None)


def _condition(statement: ast.Assert, frame: FrameType, line: int) -> str:
    """An assertion without words, as most of Megatron's are: what must hold, and the values that it speaks of."""
    values = {_name(node): _value(node, frame) for node in ast.walk(statement.test)}
    said = ", ".join(f"{name}={value}" for name, value in values.items() if name and value is not None)
    wanted = ast.unparse(statement.test)
    for owner in ("args.", "self.config.", "self.", "config."):
        wanted = wanted.replace(owner, "")
    return f"{wanted} does not hold{f' for {said}' if said else ''} ({_place(frame, line)})"


def _zero(statement: ast.stmt, frame: FrameType) -> str | None:
    """The setting that is 0, and by which Megatron divides."""
    for node in ast.walk(statement):
        if isinstance(node, ast.BinOp) and isinstance(node.op, _DIVISIONS) and _value(node.right, frame) == "0":
            return f"{_name(node.right) or ast.unparse(node.right)} is 0, and it divides by it: set it to 1 or more"
    return None


def _name(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _value(node: ast.AST, frame: FrameType) -> str | None:
    """A plain value of an attribute or name, as a config would write it."""
    if not isinstance(node, (ast.Attribute, ast.Name)):
        return None
    value: Any = None
    with suppress(Exception):
        value = eval(compile(ast.Expression(node), "<assertion>", "eval"), frame.f_globals, frame.f_locals)
    return str(value) if isinstance(value, (bool, int, float, str, list, tuple)) else None


def _place(frame: FrameType, line: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{line}"

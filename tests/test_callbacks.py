"""A list of callbacks as one: the order in which they are asked, and what they hand on."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_fc.callbacks import Callback, Callbacks, ForwardStep
from megatron_fc.megatron.parameter_count import ParameterCount


class Noted(Callback):
    """Notes every call; wraps chunks, outputs and errors in its name."""

    def __init__(self, name: str, calls: list[Any], advice: str | None = None) -> None:
        self._name, self._calls, self._advice = name, calls, advice

    def arguments_valid(self, args: Namespace) -> None:
        self._calls.append((self._name, "arguments", args.value))

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        return [f"{self._name}({chunk}, {args.value}, {parameters.total})" for chunk in chunks]

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        return lambda *words, **options: f"{self._name}({forward_step(*words, **options)})"

    def before_step(self, iteration: int) -> None:
        self._calls.append((self._name, "before", iteration))

    def after_step(self, iteration: int) -> None:
        self._calls.append((self._name, "after", iteration))

    def checkpoint_written(self, checkpoint: Path) -> None:
        self._calls.append((self._name, "written", checkpoint))

    def end(self) -> None:
        self._calls.append((self._name, "end"))

    def failed(self, error: BaseException) -> BaseException:
        return ValueError(f"{self._name}({error})")

    def advice(self) -> str | None:
        return self._advice


def pair(calls: list[Any], *advice: str | None) -> Callbacks:
    first, second = advice or (None, None)
    return Callbacks([Noted("a", calls, first), Noted("b", calls, second)])


def test_each_sees_what_the_ones_before_made() -> None:
    calls: list[Any] = []
    both = pair(calls)
    assert both.model_built(Namespace(value=3), ["x", "y"], ParameterCount(5, 1)) == [
        "b(a(x, 3, 5), 3, 5)",
        "b(a(y, 3, 5), 3, 5)",
    ]
    assert both.around_forward_step(lambda data, loss: f"{data}{loss}")("d", loss=2) == "b(a(d2))"  # type: ignore[arg-type,return-value,comparison-overlap]
    assert str(both.failed(KeyError("k"))) == "b(a('k'))"
    assert calls == []


def test_all_are_told_in_order_and_the_last_ends_first() -> None:
    calls: list[Any] = []
    both = pair(calls)
    both.arguments_valid(Namespace(value=7))
    both.before_step(4)
    both.after_step(4)
    both.checkpoint_written(Path("iter_4"))
    both.end()
    told = [("arguments", 7), ("before", 4), ("after", 4), ("written", Path("iter_4"))]
    assert calls == [*((name, *what) for what in told for name in "ab"), ("b", "end"), ("a", "end")]


def test_the_first_advice_counts() -> None:
    assert pair([], None, "wait").advice() == "wait"
    assert pair([], "go", "wait").advice() == "go"
    assert pair([]).advice() is None


def test_a_callback_that_overrides_nothing_changes_nothing() -> None:
    nothing, error, step = Callback(), OSError("disk"), lambda: None
    assert nothing.model_built(Namespace(), ["x"], ParameterCount(0, 0)) == ["x"]
    assert nothing.around_forward_step(step) is step  # type: ignore[arg-type,comparison-overlap]
    assert nothing.failed(error) is error
    assert nothing.advice() is None

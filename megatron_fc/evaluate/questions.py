"""Requests to a model, rows to score and prompts to go on with, by way of the answers that are there already."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_fc.evaluate.answers import Answers, key_of
from megatron_fc.evaluate.engine import Engine
from megatron_fc.evaluate.generation import Sampling
from megatron_fc.evaluate.scoring import Row, Score

Keep = Callable[[int, Any], None]
_LINE_SECONDS = 30.0


class Questions:
    """Asks an engine what its answers do not have.

    Args:
        engine: on the rank that leads.
        answers: of the engine's checkpoint.
    """

    def __init__(self, engine: Engine, answers: Answers) -> None:
        self.engine, self.answers = engine, answers

    def scores(self, rows: Sequence[Row], title: str, keep: Keep = lambda *_: None) -> list[Score]:
        """Return the scores of rows.

        Args:
            rows: to score.
            title: of the progress bar.
            keep: told the number of a row and its score as [logprob, is_greedy], as soon as it is there.
        """
        keys = [key_of(row.tokens, row.scored) for row in rows]

        def run(numbers: list[int]) -> Iterator[list[tuple[int, Any]]]:
            for found in self.engine.score([rows[number] for number in numbers]):
                yield [(place, [score.logprob, score.is_greedy]) for place, score in found]

        with _progress(title, len(rows), keep) as report:
            return [Score(*answer) for answer in self.answers.ask(keys, run, report)]

    def texts(
        self, prompts: Sequence[tuple[int, ...]], samplings: Sequence[Sampling], keep: Keep = lambda *_: None
    ) -> list[str]:
        """Return what the model writes behind prompts, each with the sampling of its number."""
        # What is drawn at random differs each time, and a repetition is another request.
        repetitions: dict[Any, int] = {}
        keys = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            repetition = repetitions[prompt, sampling] = repetitions.get((prompt, sampling), -1) + 1
            keys.append(key_of(prompt, vars(sampling), 0 if sampling.is_greedy else repetition))

        def run(numbers: list[int]) -> Iterator[list[tuple[int, Any]]]:
            for sampling in dict.fromkeys(samplings[number] for number in numbers):
                places = [place for place, number in enumerate(numbers) if samplings[number] == sampling]
                asked = [numbers[place] for place in places]
                # Of the request itself, so that a repetition that is asked after a kill is no copy of an earlier one.
                seeds = [int(keys[number][:8], 16) for number in asked]
                for found in self.engine.generate([prompts[number] for number in asked], seeds, sampling):
                    yield [(places[place], text) for place, text in found]

        with _progress("generate_until", len(prompts), keep) as report:
            return self.answers.ask(keys, run, report)


@contextmanager
def _progress(title: str, total: int, keep: Keep) -> Iterator[Keep]:
    """A bar on the terminal that every answer moves; elsewhere a line now and then."""
    console = Console(file=sys.__stderr__, highlight=False)  # whatever standard error is redirected to
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    done, said = 0, time.monotonic()
    with bar:
        task = bar.add_task("", total=total)

        def report(number: int, answer: Any) -> None:
            nonlocal done, said
            keep(number, answer)
            bar.advance(task)
            done += 1
            if not console.is_terminal and time.monotonic() - said >= _LINE_SECONDS:
                said = time.monotonic()
                console.print(f"{title}  {done:,}/{total:,} requests", markup=False, soft_wrap=True)

        yield report

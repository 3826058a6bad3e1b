"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, under the name megatron_fc.

    megatron-fc lm-eval --model megatron_fc --model_args checkpoint=FOLDER config=FILE [key=value ...] --tasks ...

The harness's class methods that make a model of words lead here; `megatron-fc evaluate` makes one of an open engine.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.evaluate.answers import Answers
from megatron_fc.evaluate.engine import open_engine
from megatron_fc.evaluate.generation import Sampling
from megatron_fc.evaluate.questions import Questions
from megatron_fc.evaluate.recipes import recipe_without_data
from megatron_fc.evaluate.scoring import Row
from megatron_fc.evaluate.windows import windows

# The harness would draw bootstraps in forks of this process, whose threads they lack: they would wait for ever.
os.environ["DISABLE_MULTIPROC"] = "1"

NAME = "megatron_fc"
_MAX_TOKENS = 256  # of a generation whose task does not say, as in the harness's own models
_SAMPLING = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_k", "top_p"}


@register_model(NAME)
class HarnessModel(TemplateLM):
    """The harness's view of an engine.

    Args:
        questions: what is asked of the engine.
    """

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self._questions, self._engine = questions, questions.engine
        self._until_closed = contextlib.ExitStack()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "HarnessModel":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Load a checkpoint. On ranks that follow this ends with the leader, by SystemExit.

        Args:
            arg_dict: `checkpoint`, `config`, and overrides of it.
            additional_config: the harness's; of these `batch_size` counts sequences of full length.

        Raises:
            UserError: a word is missing, or the checkpoint cannot be evaluated.
        """
        words = dict(arg_dict)
        checkpoint, config = (_path(words, name) for name in ("checkpoint", "config"))
        size = (additional_config or {}).get("batch_size")
        if not (size is None or size == "auto" or (str(size).isdecimal() and int(size) > 0)):
            raise UserError(f"--batch_size {size}: give a number from 1 on, or auto for the run's micro-batch")
        recipe = recipe_without_data(config, [f"{name}={_yaml(value)}" for name, value in words.items()])
        with contextlib.ExitStack() as stack:
            batch_size = None if size in (None, "auto") else int(size)
            engine = stack.enter_context(open_engine(recipe, find_checkpoint(checkpoint), batch_size))
            if not engine.leads:
                engine.follow()
                raise SystemExit(0)
            model = cls(Questions(engine, Answers(None, {})))
            model._until_closed = stack.pop_all()
        _OPEN.append(model)
        return model

    def close(self) -> None:
        """Let the ranks that follow end, and end Megatron's world."""
        self._until_closed.close()

    @property
    def eot_token_id(self) -> int:
        return int(self._engine.tokenizer.eod)

    @property
    def prefix_token_id(self) -> int:
        return self._engine.first_token

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens as in training data; those that Megatron's tokenizer adds by itself are among them."""
        return [int(token) for token in self._engine.tokenizer.tokenize(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]

        def keep(number: int, answer: Any) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number][0], tuple(answer))

        return [(score.logprob, score.is_greedy) for score in self._questions.scores(rows, "loglikelihood", keep)]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """As much context as the model can read before the last token of the continuation.

        The harness moves blanks at the end of a context to the continuation, which may leave none of it.
        """
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit into seq_length={self.max_length}: leave "
                f"its task out"
            )
        return Row((*(context or [self.prefix_token_id]), *continuation)[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, in windows as the harness cuts them: each token is predicted once."""
        rows: list[Row] = []
        owners: list[int] = []
        left: list[int] = []
        for number, request in enumerate(requests):
            cut = windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            rows += cut
            owners += [number] * len(cut)
            left.append(len(cut))
        sums = [0.0] * len(requests)

        def keep(place: int, answer: Any) -> None:
            number = owners[place]
            sums[number] += answer[0]
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, sums[number])

        self._questions.scores(rows, "loglikelihood_rolling", keep)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        samplings = [self._sampling(dict(request.args[1])) for request in requests]
        prompts = []
        for request, sampling in zip(requests, samplings, strict=True):
            tokens = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            prompts.append(tuple(tokens[-(self.max_length - sampling.tokens) :]))

        def keep(number: int, answer: Any) -> None:
            self.cache_hook.add_partial("generate_until", requests[number].args, answer)

        return self._questions.texts(prompts, samplings, keep)

    def _sampling(self, words: dict[str, Any]) -> Sampling:
        if unknown := sorted(words.keys() - _SAMPLING):
            raise UserError(
                f"generation_kwargs {', '.join(unknown)}: Megatron's static engine knows {', '.join(sorted(_SAMPLING))}"
            )
        until = words.get("until") or []
        stops = [until] if isinstance(until, str) else until
        tokens = int(words.get("max_gen_toks", words.get("max_tokens", _MAX_TOKENS)))
        if tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks={tokens} leaves no room for a prompt in seq_length={self.max_length}: set it in the "
                f"task's generation_kwargs"
            )
        temperature = float(words.get("temperature", 1.0)) if words.get("do_sample") else 0.0
        top_k, top_p = int(words.get("top_k", 0)), float(words.get("top_p", 0.0))
        return Sampling(tokens, tuple(stop for stop in stops if stop), temperature, top_k, top_p if top_p < 1 else 0.0)


_OPEN: list[HarnessModel] = []  # what the harness has made of words; it closes nothing


def run_command_line() -> None:
    """Run the harness's own command line, of the words in `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    finally:
        while _OPEN:
            _OPEN.pop().close()


def _path(words: dict[str, Any], name: str) -> Path:
    if name not in words:
        raise UserError(
            f"--model_args lacks {name}=...: give checkpoint=FOLDER config=FILE, and overrides as for train"
        )
    return Path(str(words.pop(name))).expanduser()


def _yaml(value: Any) -> str:
    """A value as an override's text; the harness has read it as Python's."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)

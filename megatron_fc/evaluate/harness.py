"""An engine as a model of EleutherAI's lm-evaluation-harness."""

import os
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron_fc.errors import UserError
from megatron_fc.evaluate.generation import Sampling
from megatron_fc.evaluate.questions import Questions
from megatron_fc.evaluate.scoring import Row
from megatron_fc.evaluate.windows import windows

# The harness would draw bootstraps in forks of this process, whose threads they lack: they would wait for ever.
os.environ["DISABLE_MULTIPROC"] = "1"

_MAX_TOKENS = 256  # of a generation whose task does not say, as in the harness's own models
_SAMPLING = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_k", "top_p"}


class HarnessModel(TemplateLM):
    """The harness's view of an engine.

    Args:
        questions: what is asked of the engine.
    """

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self._questions, self._engine = questions, questions.engine

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

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Which one is used; the harness asks where `--apply_chat_template` is given."""
        raise UserError(
            "--apply_chat_template: Megatron's tokenizers have no template, leave it out; `megatron-fc convert to-hf` "
            "exports the checkpoint for --model hf, whose tokenizer may have one"
        )

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

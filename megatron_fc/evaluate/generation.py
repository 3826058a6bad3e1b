"""Generated tokens: Megatron's static engine with its key-value cache, a batch at a time, on every rank."""

import contextlib
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from megatron.core.utils import unwrap_model
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when there are enough.

    Attributes:
        tokens: at most so many.
        until: texts of which one ends the generation.
        temperature: 0 for the likeliest token each time; then `top_k` and `top_p` do not count.
        top_k: draw from so many likeliest tokens, 0 for all.
        top_p: draw from the likeliest tokens of this joint probability, 0 for all.
    """

    tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def generate_batch(
    args: Namespace, chunk: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int
) -> list[str]:
    """Return what follows each prompt, up to the end of the document or the first of the texts that end it.

    Args:
        args: Megatron's.
        chunk: this rank's part of the model.
        tokenizer: Megatron's.
        prompts: tokens, at least one of each.
        sampling: of all of them.
        seed: of what is drawn.
    """
    longest = max(map(len, prompts)) + sampling.tokens
    context = StaticInferenceContext(max_batch_size=len(prompts), max_sequence_length=longest)
    params = SamplingParams(
        temperature=sampling.temperature or 1.0,
        top_k=1 if sampling.is_greedy else sampling.top_k,
        top_p=0.0 if sampling.is_greedy else sampling.top_p,
        num_tokens_to_generate=sampling.tokens,
    )
    with _inferring(args, chunk), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the static engine is to go, and the dynamic one needs flash_attn and a GPU
        controller = _Stopping(GPTInferenceWrapper(chunk, context), tokenizer, prompts, sampling.until)
        controller.sampling_rng.manual_seed(seed)
        engine = StaticInferenceEngine(controller, legacy=True, random_seed=seed + 1)
        requests = [
            InferenceRequest(
                request_id=engine.get_new_request_id(), prompt="", prompt_tokens=list(prompt), sampling_params=params
            )
            for prompt in prompts
        ]
        answers = engine.generate(inference_requests=requests)
    texts = [tokenizer.detokenize(answer.generated_tokens.tolist(), skip_special_tokens=True) for answer in answers]
    return [_cut(text, sampling.until) for text in texts]


class _Stopping(TextGenerationController):
    """Ends a prompt's generation at a text, too: Megatron's static engine only knows the end of a document."""

    def __init__(
        self, wrapper: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], until: tuple[str, ...]
    ) -> None:
        super().__init__(wrapper, tokenizer)
        self._prompts, self._until = prompts, until

    def update_generation_status(self, **status: Any) -> tuple[Tensor, Tensor]:
        done, lengths = super().update_generation_status(**status)
        end = status["current_context_end_position"] + 1
        for number, prompt in enumerate(self._prompts):
            if self._until and len(prompt) < end and not done[number]:
                # A special token may be what ends it.
                tokens = status["updated_prompts_tokens"][number, len(prompt) : end].tolist()
                text = self.tokenizer.detokenize(tokens, skip_special_tokens=False)
                done[number] = any(stop in text for stop in self._until)
        return done, lengths


@contextlib.contextmanager
def _inferring(args: Namespace, chunk: Any) -> Iterator[None]:
    """The model as the engine needs it, and left as it was; the engine's own bar stays off the terminal."""
    model = unwrap_model(chunk)
    backend = model.config.attention_backend
    if args.transformer_impl == "local":
        model.config.attention_backend = AttnBackend.local  # the wrapper's word for an attention that is given its mask
    if args.sequence_parallel and args.expert_model_parallel_size == 1:
        set_model_to_sequence_parallel(model, False)  # with experts on several ranks the engine does so itself
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            InferenceMode.unset_active()  # an engine marks the process as inferring and leaves it at that
            model.config.attention_backend = backend
            if args.sequence_parallel:
                set_model_to_sequence_parallel(model, True)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some others."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

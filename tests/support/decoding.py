"""Greedy decoding with a key-value cache by Megatron's static engine.

Everything is Megatron's own: engine, scheduler, controller, context, cache. `legacy=True` is its static path; without
it the engine hands over to the dynamic one, which needs flash_attn.
"""

import warnings
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.enums import AttnBackend

from support import tiny
from support.prompts import NEW, PROMPTS, Numbers

_GREEDY = SamplingParams(num_tokens_to_generate=NEW, top_k=1, return_log_probs=True)


class _Recorded(GPTInferenceWrapper):
    """Keeps the logits of every step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[torch.Tensor] = []

    def run_one_forward_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps.append(super().run_one_forward_step(*args, **kwargs))
        return self.steps[-1]


def generate(model: torch.nn.Module) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens generated for each prompt of `PROMPTS`, and the logits of all steps in a row."""
    model.eval()
    # The wrapper reads it: make a mask for the core attention, which is Megatron's own here and not TE's.
    model.config.attention_backend = AttnBackend.local
    context = StaticInferenceContext(max_batch_size=len(PROMPTS), max_sequence_length=tiny.SEQUENCE)
    wrapper = _Recorded(model, context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = StaticInferenceEngine(TextGenerationController(wrapper, Numbers()), legacy=True)
    try:
        requests = engine.generate(prompts=[" ".join(map(str, prompt)) for prompt in PROMPTS], sampling_params=_GREEDY)
    finally:
        InferenceMode.unset_active()  # an engine marks the process as inferring and leaves it at that
    assert len(wrapper.steps) == max(map(len, PROMPTS)) - min(map(len, PROMPTS)) + NEW
    assert all(step.shape[1] == 1 for step in wrapper.steps[1:]), "decoded without the cache"
    return [request.generated_tokens.tolist() for request in requests], torch.cat(wrapper.steps, dim=1)

"""Greedy decoding with a key-value cache by Megatron's static engine: the tokens and logits of the full forward pass.

Everything is Megatron's own: engine, scheduler, controller, context, cache. `legacy=True` is its static path; without
it the engine hands over to the dynamic one, which needs flash_attn (`tests/gpu/test_dynamic_inference.py`). MLA is
left out: its core attention is Transformer Engine's.
"""

import warnings
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.enums import AttnBackend

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from saved_bytes import saved_tensors
from support import tiny
from support.prompts import NEW, PROMPTS, Numbers

GREEDY = SamplingParams(num_tokens_to_generate=NEW, top_k=1, return_log_probs=True)
# A cached step multiplies matrices of other shapes, hence in another order, than the full pass.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Recorded(GPTInferenceWrapper):
    """Keeps the logits of every step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[torch.Tensor] = []

    def run_one_forward_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps.append(super().run_one_forward_step(*args, **kwargs))
        return self.steps[-1]


def build(kind: str, frac: ConnectionConfig | None) -> torch.nn.Module:
    model = tiny.build(kind, frac).eval()
    # The wrapper reads it: make a mask for the core attention, which is Megatron's own here and not TE's.
    model.config.attention_backend = AttnBackend.local
    return model


def generate(model: torch.nn.Module) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens generated for each prompt, and the logits of all steps in a row."""
    context = StaticInferenceContext(max_batch_size=len(PROMPTS), max_sequence_length=tiny.SEQUENCE)
    wrapper = Recorded(model, context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = StaticInferenceEngine(TextGenerationController(wrapper, Numbers()), legacy=True)
    try:
        requests = engine.generate(prompts=[" ".join(map(str, prompt)) for prompt in PROMPTS], sampling_params=GREEDY)
    finally:
        InferenceMode.unset_active()  # an engine marks the process as inferring and leaves it at that
    assert len(wrapper.steps) == max(map(len, PROMPTS)) - min(map(len, PROMPTS)) + NEW
    assert all(step.shape[1] == 1 for step in wrapper.steps[1:]), "decoded without the cache"
    return [request.generated_tokens.tolist() for request in requests], torch.cat(wrapper.steps, dim=1)


def full_forward(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """Logits [length, vocabulary] without a cache."""
    with torch.no_grad():
        return tiny.logits(model, torch.tensor([[*sequence, 0]]))[0]


FRACS = (FracConfig(rate=4), FracConfig(rate=4, dynamic=False), FracConfig(rate=4, recompute=True))
DHC, MHC, MFC = HyperConfig(slots=4), ManifoldConfig(slots=4), ManifoldConfig(slots=4, fractions=4)
LEARNED = ManifoldConfig(slots=4, leave="learned")
KINDS = ("dense", "moe", "mixed", "shared", "hybrid")


@pytest.mark.parametrize(
    ("kind", "frac"),
    [
        *((kind, frac) for kind in KINDS for frac in FRACS),
        ("mixed", DHC),
        ("hybrid", DHC),
        ("mixed", MHC),
        ("hybrid", LEARNED),
        ("dense", MFC),
        ("dense", HyperConfig(slots=2, dynamic=False)),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_cached_decoding_equals_the_full_forward_pass(kind: str, frac: ConnectionConfig) -> None:
    model = build(kind, frac)
    tiny.randomise_connections(model)
    generated, steps = generate(model)
    for row, (prompt, new) in enumerate(zip(PROMPTS, generated, strict=True)):
        logits = full_forward(model, prompt + new)[:-1]
        assert new == logits[len(prompt) - 1 :].argmax(-1).tolist()
        torch.testing.assert_close(steps[row, : len(logits)], logits, **CLOSE)
        # The tolerance is narrow enough to see the connections.
        assert not torch.allclose(full_forward(build(kind, frac), prompt + new)[:-1], logits, rtol=1e-2, atol=1e-2)


def test_tokens_at_initialisation_are_the_residual_models() -> None:
    tokens, logits = generate(build("mixed", None))
    for connection in (FracConfig(rate=4), DHC):
        with_connections, same_logits = generate(build("mixed", connection))
        assert with_connections == tokens
        assert torch.equal(same_logits, logits)


@pytest.mark.parametrize(
    ("kind", "connection"),
    [*((kind, FRACS[0]) for kind in ("dense", "mixed", "mla", "mtp", "hybrid")), ("mtp", DHC), ("hybrid", LEARNED)],
    ids=lambda value: getattr(value, "label", value),
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_kept_without_gradients(kind: str, connection: ConnectionConfig, training: bool) -> None:
    """Megatron enables gradients around the depth connection: under no_grad it must record no graph all the same."""
    model = tiny.build(kind, connection).train(training)
    with torch.no_grad(), saved_tensors() as saved:
        loss = tiny.loss(model, tiny.tokens())
    assert not saved
    assert not loss.requires_grad

"""Megatron's dynamic inference engine: the greedy tokens of the full forward pass. Not run yet: it needs a card."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode

import rank
from megatron_fc import FracConfig
from support import tiny
from support.prompts import NEW, PROMPTS, Numbers

pytestmark = pytest.mark.gpu


@pytest.fixture
def one_card() -> Iterator[None]:
    with rank.one_rank():
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
        InferenceMode.unset_active()


@pytest.mark.usefixtures("one_card")
@pytest.mark.parametrize("frac", [FracConfig(rate=4), FracConfig(rate=4, dynamic=False)], ids=["dfc", "sfc"])
def test_tokens_are_those_of_the_full_forward_pass(frac: FracConfig) -> None:
    pytest.importorskip("flash_attn")
    model = tiny.build("dense", frac, bf16=True, params_dtype=torch.bfloat16).eval()
    tiny.randomise_connections(model)
    model.cuda()
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=tiny.SEQUENCE)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Numbers())
    engine = StaticInferenceEngine(controller, buffer_size_gb=0.1)
    assert not engine.legacy, "the static engine stepped in"
    requests = engine.generate(
        prompts=[" ".join(map(str, prompt)) for prompt in PROMPTS],
        sampling_params=SamplingParams(num_tokens_to_generate=NEW, top_k=1),
    )
    InferenceMode.unset_active()
    for prompt, request in zip(PROMPTS, requests, strict=True):
        new = list(request.generated_tokens)
        ids, positions, mask = (x.cuda() for x in tiny.inputs(torch.tensor([[*prompt, *new, 0]])))
        with torch.no_grad():
            logits = model(ids, positions, mask)[0, len(prompt) - 1 : -1].float()
        # Two tokens may tie in bf16: what was chosen is the best one or within rounding of it.
        chosen = logits.gather(1, torch.tensor(new, device=logits.device)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 2e-2

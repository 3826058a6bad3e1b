"""Megatron's world of one process, on a GPU or without one, and a small model's config: what the examples share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_fc.training import cpu_lane

cpu_lane.install()  # before Megatron is imported; it changes nothing where there is a CUDA device

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

VOCABULARY, SEQUENCE = 256, 64


@contextmanager
def one_process() -> Iterator[None]:
    """Set up Megatron's process groups for a world of one, and take them down again."""
    backend = "gloo" if cpu_lane.needed() else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def small_config(**more: object) -> TransformerConfig:
    """Return the config of a model that trains in seconds on a CPU."""
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    values = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_backend": AttnBackend.unfused,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(values | more))


def losses(model: torch.nn.Module, steps: int) -> list[float]:
    """Train on one batch, whose tokens count upwards, and return the loss of each step."""
    device = torch.device("cpu" if cpu_lane.needed() else "cuda")
    model.to(device)
    text = (torch.arange(SEQUENCE + 1, device=device) + torch.arange(4, device=device)[:, None] * 50) % VOCABULARY
    positions = torch.arange(SEQUENCE, device=device).expand(4, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)  # True is masked
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        loss = model(text[:, :-1], positions, mask, labels=text[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found

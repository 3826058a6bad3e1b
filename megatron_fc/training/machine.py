"""Megatron flags that follow from the machine: what is missing here decides what has to be turned off."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fc.training import cpu_lane


@dataclass(frozen=True)
class Adaptation:
    """Flags that a machine needs, and the sentence that announces them."""

    reason: str
    settings: dict[str, Any]


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """NVIDIA's Apex. The PyPI package of that name is another project, so its name alone proves nothing."""
    found = importlib.util.find_spec
    # In this order: the second look imports a package called apex, whoever wrote it.
    return found("amp_C") is not None and found("apex") is not None and found("apex.optimizers") is not None


def has_fused_weight_gradients() -> bool:
    """Apex's extension that Megatron's own linear layers need for it; Transformer Engine does not replace it there."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def device_capability() -> tuple[int, int] | None:
    """Compute capability of this process's CUDA device, None without one."""
    return None if cpu_lane.needed() else torch.cuda.get_device_capability()


def adaptations(transformer_impl: str | None = None) -> list[Adaptation]:
    """Return what this machine needs; a run's own settings take precedence over each of them.

    Args:
        transformer_impl: as the run sets it, None where it does not.
    """
    found = []
    if cpu_lane.needed():
        found.append(
            Adaptation(
                "no CUDA device: CPU lane over gloo",
                {
                    "distributed_backend": "gloo",
                    "use_cpu_initialization": True,
                    "attention_backend": "unfused",
                    "num_workers": 0,
                    "no_masked_softmax_fusion": True,
                    "no_rope_fusion": True,
                    "no_bias_swiglu_fusion": True,
                    "no_bias_gelu_fusion": True,
                    "no_bias_dropout_fusion": True,
                },
            )
        )
    if not has_transformer_engine():
        found.append(
            Adaptation(
                "no Transformer Engine: Megatron's local layers, no FP8",
                {"transformer_impl": "local", "no_persist_layer_norm": True},
            )
        )
    elif transformer_impl == "local":
        found.append(
            Adaptation(
                "transformer_impl=local: torch's norms, which have no persistent kernel",
                {"no_persist_layer_norm": True},
            )
        )
    if importlib.util.find_spec("apex") is not None and not has_apex():
        found.append(
            Adaptation("the package apex here is not NVIDIA's, and Megatron takes it for that: pip uninstall apex", {})
        )
    if not has_fused_weight_gradients():
        found.append(
            Adaptation(
                "no Apex: weight gradients accumulate unfused",
                {"no_gradient_accumulation_fusion": True},
            )
        )
    return found

"""Which recipes a machine can compute."""

import pytest
import torch

from megatron_fc.compress.recipes import RECIPES, refuse_unavailable
from megatron_fc.errors import UserError


def test_nvfp4_needs_a_newer_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    pretend(None)
    with pytest.raises(UserError, match=r"this machine has no CUDA device: .*take fp8, int8 or int4_awq"):
        refuse_unavailable("nvfp4")
    pretend((8, 6))
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8.9 or newer, this machine has 8\.6"):
        refuse_unavailable("nvfp4")
    for recipe in RECIPES.keys() - {"nvfp4"}:
        refuse_unavailable(recipe)
    pretend((8, 9))
    refuse_unavailable("nvfp4")

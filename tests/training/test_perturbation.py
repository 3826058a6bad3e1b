"""First weights moved by a ten-millionth of themselves, the same on every replica; what cannot be is refused."""

from argparse import Namespace

import pytest
import torch

from megatron_fc.errors import UserError
from megatron_fc.training.perturbation import SIZE, Perturbation

ARGS = {"bf16": False, "fp16": False, "pipeline_model_parallel_size": 1, "untie_embeddings_and_output_weights": True}


def perturbed(number: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    chunk = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    Perturbation(number).model_built(Namespace(), [chunk], None)  # type: ignore[arg-type]
    return [parameter.detach().double() for parameter in chunk.parameters()]


def test_weights_move_by_that_much_and_replicas_alike() -> None:
    torch.manual_seed(1)
    before = [p.detach().double() for p in torch.nn.Linear(64, 64).parameters()]
    first, again, other = perturbed(1), perturbed(1), perturbed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    relative = (first[0] / before[0] - 1).std()
    # In fp32 both ends of the product are rounded.
    assert 0.5 * SIZE < relative < 2 * SIZE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bf16": True}, "perturbation=1 is below the rounding of 16 bits: set bf16=false"),
        (
            {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
            "would part the tied embeddings of the first and last pipeline stage",
        ),
    ],
)
def test_what_cannot_be_perturbed(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Perturbation(1).arguments_valid(Namespace(**(ARGS | changes)))

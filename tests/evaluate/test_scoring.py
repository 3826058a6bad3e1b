"""Scores of tokens from shares of a vocabulary, and requests in rounds of like length."""

from pathlib import Path

import pytest
import torch

from megatron_fc.evaluate.batching import rounds
from support import harness


@pytest.mark.parametrize("world", [1, 2])
def test_scores_are_those_of_the_whole_vocabulary(world: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 10, generator=generator)
    tokens = logits.argmax(1)
    tokens[::2] = torch.randint(0, 10, (32,), generator=generator)
    logits[1, [2, 7]] = 90.0  # equally likely ones, of which the first counts
    tokens[1] = 7
    logits[3] += 1e4  # whose exponential is no number
    expected = logits.double().log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    for logprobs, greedy in harness.run("scores_of_shares", world, tmp_path / "ranks", logits, tokens):
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(logprobs[4:].double(), expected[4:], rtol=1e-6, atol=1e-5)
        assert torch.equal(greedy, tokens == logits.argmax(1))
        assert not greedy[1]


def test_every_request_is_in_one_round_and_fits() -> None:
    lengths = [3, 50, 7, 7, 100, 1, 200, 8, 8]
    found = list(rounds(lengths, tokens=100, batches=2))
    assert sorted(number for one in found for number in one.numbers) == list(range(len(lengths)))
    for one in found:
        longest = lengths[one.numbers[0]]
        assert longest == max(lengths[number] for number in one.numbers)
        assert one.size == 1 or one.size * longest <= 100
        assert len(one.numbers) <= 2 * one.size
    assert lengths[found[0].numbers[0]] == 200
    assert len(found[-1].numbers) > 2
    assert list(rounds([], 100, 2)) == []

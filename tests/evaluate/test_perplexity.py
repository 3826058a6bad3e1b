"""What a set's log-likelihoods come to; `test_evaluate.py` scores real sets."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fc import UserError
from megatron_fc.cli.evaluate_perplexity import _sets
from megatron_fc.evaluate.perplexity import _loss


def test_loss_is_per_token_and_bits_are_per_byte() -> None:
    scores = [SimpleNamespace(logprob=-3.0), SimpleNamespace(logprob=-5.0)]
    questions: Any = SimpleNamespace(scores=lambda rows, name: scores)
    texts: Any = SimpleNamespace(rows=[], tokens=4, size=10)
    found = _loss(questions, texts, "a set")
    assert found["value"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["bits_per_byte"] == pytest.approx(8.0 / math.log(2) / 10)
    assert (found["tokens"], found["bytes"]) == (4, 10)


def test_a_name_stands_for_one_set() -> None:
    assert _sets(["c4=a", "c4=a", "wiki=b"], Path()) == {"c4": Path("a"), "wiki": Path("b")}
    with pytest.raises(UserError, match="--sets: c4 is given twice, as a and b: give one another name"):
        _sets(["c4=a", "c4=b"], Path())

import pytest

from megatron_fc.data.filters import Filters
from megatron_fc.errors import UserError


def test_shares_are_above_0_and_up_to_1() -> None:
    for filters in ({"max_word": 0.0}, {"max_two_words": 1.5}, {"max_word": float("nan")}, {"min_stars": -1}):
        with pytest.raises(UserError, match="give "):
            Filters(**filters)
    assert Filters(max_word=0.5).of_text("", {}) is None

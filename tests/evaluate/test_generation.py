"""Where a generated text ends, and whether anything is drawn; `test_evaluate.py` generates."""

import pytest

from megatron_fc.evaluate.generation import _cut


@pytest.mark.parametrize(
    ("until", "left"),
    [
        (["\n\n", "Q:"], "one. "),
        (["\n\n"], "one. Q: two"),
        (["."], "one"),
        (["none of it"], "one. Q: two\n\nthree"),
        ([], "one. Q: two\n\nthree"),
    ],
)
def test_a_text_ends_before_the_first_of_its_stops(until: list[str], left: str) -> None:
    assert _cut("one. Q: two\n\nthree", until) == left

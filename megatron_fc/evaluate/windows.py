"""Windows of a text: each token is predicted once, behind as many as the model can read."""

from collections.abc import Sequence

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_fc.evaluate.scoring import Row


def windows(tokens: Sequence[int], first: int, length: int) -> list[Row]:
    """Cut a text as the harness does.

    Args:
        tokens: of the text.
        first: token that it begins behind; where it begins with it, it is the text's own.
        length: tokens that the model reads.
    """
    own = list(tokens[1:] if tokens and tokens[0] == first else tokens)
    cut = map(make_disjoint_window, get_rolling_token_windows(own, first, length, context_len=1))
    return [Row((*context, *scored)[-(length + 1) :], len(scored)) for context, scored in cut]

"""`megatron-fc analyze similarity`: the cosine between inputs of consecutive sub-layers (2503.14125, figure 2).

Where it is near 1 a sub-layer sees what the one before it saw: representations collapse.
"""

from typing import Any

import numpy as np
import torch

from megatron_fc.analysis.observed import observe
from megatron_fc.analysis.source import Source
from megatron_fc.analysis.values import facts_of

_QUANTILES = (0.05, 0.5, 0.95)


def analyze_similarity(source: Source) -> dict[str, Any] | None:
    """Return median and 5-95 % band over tokens, per sub-layer from the second on.

    Every rank calls it; on others than the first None is returned. Inputs are those before the sub-layers' norms.

    Raises:
        UserError: as `observe`.
    """
    observed = observe(source)
    if observed is None:
        return None
    pairs = []
    for (layer, name), cosines in zip(observed.names[1:], observed.cosines, strict=True):
        low, median, high = np.quantile(cosines.numpy(), _QUANTILES).tolist()  # torch's takes 2^24 values at most
        pairs.append({"layer": layer, "sub_layer": name, "low": low, "median": median, "high": high})
    every = torch.cat(observed.cosines) if observed.cosines else torch.full((1,), torch.nan)
    return {
        **facts_of(source, observed.tokens),
        "loss": observed.loss,
        "pairs": pairs,
        "median": float(np.median(every.numpy())),
    }

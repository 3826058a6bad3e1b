"""The norm in front of a sub-layer, as weights that a kernel can apply in the width connection's pass."""

from typing import Literal, NamedTuple

from torch import Tensor

NormKind = Literal["rmsnorm", "layernorm"]


class NormWeights(NamedTuple):
    """A norm over the whole width d.

    Attributes:
        kind: rmsnorm or layernorm.
        weight: [d].
        bias: [d] or None.
        eps: added to the mean square or the variance.
        one_plus: the weight is stored less one (Megatron's `layernorm_zero_centered_gamma`).
    """

    kind: NormKind
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    one_plus: bool = False

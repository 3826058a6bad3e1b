"""The handover from a width connection to the depth connection of the same site.

The mixed residual A(h)^T h is never in memory. It has a name nevertheless: `mixed`, an output of the width connection
and an input of the depth connection, of the stream's shape and without storage of its own. Its value is made anew where
it is needed; its gradient, that of the next residual stream, is real and is what the width connection's backward pass
takes. So one pass writes the whole gradient of h, and autograd has nothing to add up.
"""

from typing import NamedTuple

from torch import Tensor


class Handover(NamedTuple):
    """Coefficients, the name of the mixed residual, and who made them.

    Attributes:
        beta: [tokens, n] in fp32.
        alpha: [tokens, n*n] in fp32, without gradient: that comes through `mixed`.
        mixed: [..., n*c] without storage, the mixed residual.
        backend: triton or torch, chosen by the width connection for the depth connection, too.
    """

    beta: Tensor
    alpha: Tensor
    mixed: Tensor
    backend: str

    @property
    def detached(self) -> "Handover":
        """The same without autograd's graph."""
        return self._replace(beta=self.beta.detach(), mixed=self.mixed.detach())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All but the backend, as the operations take them."""
        return self.beta, self.alpha, self.mixed


def without_storage(like: Tensor) -> Tensor:
    """A tensor of the same shape and one element, which has no value: to write one would be a launch."""
    return like.new_empty(1).expand(like.shape)

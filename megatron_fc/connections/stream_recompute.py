"""Recompute of the stream: a group of layers keeps one stream for backward, not one for every sub-layer.

Every other stream of the group follows from the one before it and a sub-layer's output, which a depth connection keeps
in any case. A `Link` says how, and stands in autograd's graph in place of the stream and of x, the input of the
sub-layer's norm. Backward wants the last stream first: that computes those of the whole group, once, with the functions
of the forward pass and so to the bit. They last as long as their links, which go with the nodes of the graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_fc.connections.handover import Handover
from megatron_fc.connections.observers import observed
from megatron_fc.connections.parcel import values_of
from megatron_fc.errors import UserError


class Kept:
    """A tensor for backward, outside of autograd, which notices as autograd does when it has been written to."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            UserError: it is no longer what it was.
        """
        if self._tensor._version != self._version:
            raise UserError(
                "a stream or a sub-layer's output that stream_layers keeps for backward was written to in place: "
                "write to a copy, or set stream_layers to 0"
            )
        return self._tensor


class Written(NamedTuple):
    """How a stream came about.

    Attributes:
        link: of the site that made it.
        o: what that site wrote to its stream, bias and dropout included.
    """

    link: "Link"
    o: Kept


class Link:
    """The stream that a site reads [..., n*c] and its x [..., d], as what they are computed from.

    Args:
        site: the site.
        norm: of the sub-layer.
        h: the stream; kept where a group begins.
        written: how it came about, None where nobody knows.
        begins_layer: the site is the first one of its layer.
    """

    def __init__(self, site: Any, norm: nn.Module, h: Tensor, written: Written | None, begins_layer: bool) -> None:
        self._site, self._norm, self._version = site, norm, h._version
        self._layers: int = 1 if written is None else written.link._layers + begins_layer
        self._written = written if self._layers <= site.config.stream_layers else None
        self._h: Kept | None = None
        if self._written is None:
            self._layers, self._h = 1, Kept(h)
        self._values = self._parameters()
        self._wants_x = False
        self._x: Tensor | None = None
        self._handover: Handover | None = None

    def width(self, h: Tensor) -> tuple[Tensor, Handover | None]:
        """The site's width connection and the norm behind it, with this link for backward.

        Returns:
            The sub-layer's input, and the handover; None where somebody observes the site, who may change its x.
        """
        with self.in_place_of(h) as also_of:
            if observed(self._site):
                return self._norm(self._site(h)), None
            if self._site.takes_norm(self._norm, h):
                x, handover = self._site(h, self._norm, hand_over=True)
            else:
                x, handover = self._site(h, hand_over=True)
                also_of(x)
                x = self._norm(x)
        if handover.backend == "triton":  # where coefficients alone come from another kernel, which may round otherwise
            self._handover = handover.detached
        return x, handover

    def describes(self, h: Tensor) -> bool:
        """Whether h, or a view of it, is still what it was when the link was made."""
        return h._version == self._version

    @contextmanager
    def in_place_of(self, h: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """Let autograd keep this link where it would keep h, and x once the function that this gives was told it."""
        places = [_Place(h, h._version, self._stream)]

        def pack(tensor: Tensor) -> "Tensor | _Packed":
            value = next((place.value for place in places if place.holds(tensor)), None)
            if value is None:
                return tensor
            self._wants_x |= value == self._input
            return _Packed(value, tensor.shape)

        with saved_tensors_hooks(pack, _unpack):
            try:
                yield lambda x: places.append(_Place(x, x._version, self._input))
            finally:
                places.clear()  # autograd may hold on to `pack`

    def written(self, o: Tensor) -> Written:
        """How the stream comes about that the site's depth connection makes of an o that is kept for backward."""
        return Written(self, Kept(o))

    def _stream(self) -> Tensor:
        links: list[Link] = []
        link = self
        while link._h is None and link._written is not None:
            links.append(link)
            link = link._written.link
        for link in reversed(links):
            assert link._written is not None
            before, o = link._written
            link._h = Kept(before._following(o.tensor()))
        assert self._h is not None
        return self._h.tensor()

    def _input(self) -> Tensor:
        """x; the coefficients for the depth connection come with it."""
        if self._x is None:
            self._check()
            self._x, self._handover = self._site.forward(self._stream(), hand_over=True)
        return self._x

    def _following(self, o: Tensor) -> Tensor:
        if self._wants_x:
            self._input()
        self._check()
        following: Tensor = self._site.depth(o, self._stream(), self._handover)
        return following

    def _parameters(self) -> tuple[Any, ...]:
        return values_of(*self._site.parameters(), *self._norm.parameters())

    def _check(self) -> None:
        """Autograd itself no longer does, of what was saved through hooks."""
        if self._parameters() != self._values:
            raise UserError(
                "a parameter of a connection or of a norm was changed between the forward and the backward pass, in "
                "which stream_layers computes the stream again: step the optimizer behind the backward pass"
            )


class _Place(NamedTuple):
    """Where a value lies in the forward pass, and the function that computes it again."""

    tensor: Tensor
    version: int
    value: Callable[[], Tensor]

    def holds(self, saved: Tensor) -> bool:
        """Whether a saved tensor is this one, perhaps with its leading dimensions in another shape."""
        mine = self.tensor
        return (
            saved.data_ptr() == mine.data_ptr()
            and (saved.dtype, saved.numel()) == (mine.dtype, mine.numel())
            and saved.is_contiguous()
            and mine.is_contiguous()
            and mine._version == self.version
        )


class _Packed(NamedTuple):
    value: Callable[[], Tensor]
    shape: torch.Size


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed.value().view(packed.shape)

"""Bytes that torch operations hold for a moment, beside what waits for backward; rows alone, tables left out."""

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs.traffic import FP32, Stream


def width_backward(stream: Stream, config: ConnectionConfig) -> int:
    """Peak per token of a width connection's backward, the step of a site that holds most.

    Its gradients come in, of x and of the mixed residual, and are laid side by side in fp32; h is copied to fp32, and
    centred for a layernorm; the gradient of h is made in fp32, and copied to the dtype of the stream.
    """
    slots = config.stream_width(stream.width)
    beside = slots + stream.width
    is_half = stream.element_bytes < FP32
    centred = getattr(config, "norm", None) == "layernorm" and bool(config.parameter_shapes(stream.width))
    in_fp32 = beside + slots + (slots if is_half else 0) + (slots if centred else 0)
    return FP32 * in_fp32 + stream.element_bytes * (beside + (slots if is_half else 0))


def coefficients_backward(stream: Stream, config: ConnectionConfig) -> int:
    """Peak per token of a width connection's backward whose coefficients torch predicts and a kernel mixes with.

    Its gradients come in and the gradient of h goes out, all in the stream's dtype.
    """
    return stream.element_bytes * (2 * config.stream_width(stream.width) + stream.width)

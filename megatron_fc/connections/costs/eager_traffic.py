"""Model of the bytes that unfused torch moves for the family of connections: one operation, one pass over memory.

Follows the operations of `connections.eager`, of `connections.reference` under autograd, and of Hyper-Connections as
the paper lists them. Beside the stream's rows there are rows of d in fp32, in which connections compute: `wide`, a row
for an fp32 stream, two for bf16. The terms per token are one value per slot (`one`: n), tables (`gamma`: n*m, `matrix`:
n*n), or all k = 1+m+n coefficients of n slots (`all`: k*n).
"""

from dataclasses import dataclass

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.costs.traffic import FP32, Moves, Stream, Traffic, depth, gradient_sum, mixing, norm

INDEX = 8  # bytes of an int64
PerSlotConfig = FracConfig | HyperConfig
Config = PerSlotConfig | ManifoldConfig


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token of what passes through memory; `weight` is once, of the projection.

    Attributes:
        row, wide: x or o, in the dtype of the stream and in fp32.
        stream, slots: h likewise.
        predicted: the coefficients that are predicted, all of them where beta and alpha are.
    """

    row: int
    wide: int
    stream: int
    slots: int
    one: int
    gamma: int
    matrix: int
    predicted: int
    weight: int

    @classmethod
    def of(cls, stream: Stream, config: ConnectionConfig) -> "_Sizes":
        n, m = config.slots, config.fractions
        width = config.stream_width(stream.width)
        shapes = config.parameter_shapes(stream.width)
        weight = shapes.get("dynamic_weight", shapes.get("mapping_weight", (0, 0)))
        predicted = weight[0] if "mapping_weight" in shapes else n * weight[0]
        return cls(
            row=stream.row,
            wide=FP32 * stream.width,
            stream=width * stream.element_bytes,
            slots=FP32 * width,
            one=FP32 * n,
            gamma=FP32 * n * m,
            matrix=FP32 * n * n,
            predicted=FP32 * predicted,
            weight=FP32 * weight[0] * weight[1],
        )

    @property
    def all(self) -> int:
        return self.one + self.gamma + self.matrix

    @property
    def upcast(self) -> Traffic:
        """Of a row to fp32, where it is not fp32 already."""
        return Traffic(self.row, self.wide) if self.row < self.wide else Traffic()

    @property
    def downcast(self) -> Traffic:
        """Of a row from fp32."""
        return Traffic(self.wide, self.row) if self.row < self.wide else Traffic()

    @property
    def stream_upcast(self) -> Traffic:
        return Traffic(self.stream, self.slots) if self.stream < self.slots else Traffic()

    @property
    def stream_downcast(self) -> Traffic:
        return Traffic(self.slots, self.stream) if self.stream < self.slots else Traffic()


# The torch backend, megatron_fc/connections/eager.py.


def torch_backend(stream: Stream, config: ConnectionConfig) -> Moves:
    """A layer of the torch backend: in fp32 and at m = 4 about 24 + 58 rows of DFC, terms included."""
    assert isinstance(config, Config)
    s = _Sizes.of(stream, config)
    width = Moves(_torch_width_forward(s, config), _torch_width_backward(s, config), s.stream)
    return (width + norm(stream) + _torch_depth(s, config)) * 2


def mixing_kernels(stream: Stream, config: ManifoldConfig) -> Moves:
    """A layer of kernels on a manifold: some make the coefficients of what torch takes from the stream, some mix.

    Torch reads the stream in its own dtype, once for its norm and once for the projection; in backward both again, to
    its gradient it adds twice (3r and 2r rows), and the projection's reads the stream. At n = 4 that is 16 + 64 rows,
    and the kernels' that mix are 28 + 38. What goes through the others is small: per token the norm and the product,
    two of them where a stream of 16 bits is multiplied by halves of W, the coefficients, and the gradients of all. An
    fp16 stream is taken for one of bf16; its copy in fp32 is left out.
    """
    s = _Sizes.of(stream, config)
    halves = 2 if s.row < s.wide else 1
    # W and the gradient of the product are three blocks of halves.
    blocks = 1.5 if halves == 2 else 1
    forward = Traffic(s.stream, FP32) + Traffic(s.stream, halves * s.all, s.weight, 0)
    forward += Traffic(halves * s.all + FP32, s.all)
    backward = forward + Traffic(halves * s.all + FP32 + s.all, blocks * s.all + FP32)
    backward += Traffic(2 * s.stream + FP32, s.stream)
    backward += Traffic(s.stream + blocks * s.all, s.stream, blocks * s.weight, 0)
    backward += Traffic(s.stream + s.all, 0, 0, halves * s.weight)
    if halves == 2:
        split = Traffic(0, 0, s.weight, blocks * s.weight)
        forward, backward = forward + split, backward + split + Traffic(0, 0, 2 * s.weight, s.weight)
    return (Moves(forward, backward) + mixing(stream, config) + depth(stream, config)) * 2


def _torch_width_forward(s: _Sizes, config: Config) -> Traffic:
    """h is read for the coefficients and for the mixing, which writes x.

    Of the coefficients, all in one table, beta, gamma and alpha are copied out.
    """
    copied = Traffic(s.all, s.all) if _predicts(config) else Traffic(0, s.all)
    mixing = _mixing(s, config, outputs=config.fractions, inputs=config.slots)
    return s.stream_upcast + _torch_coefficients(s, config) + copied + mixing + s.downcast


def _torch_width_backward(s: _Sizes, config: Config) -> Traffic:
    """g_x and g_mixed are laid side by side: r + 1 rows read and written. Their products with h, 2r + 1 rows, are the
    coefficients'.

    Coefficients are computed again, and the mixing of both gradients reads r + 1 rows and writes the r of h's.
    """
    n, m = config.slots, config.fractions
    total = s.stream_upcast + Traffic(s.row + s.stream, s.wide + s.slots)
    total += Traffic(2 * s.slots + s.wide, s.gamma + s.matrix)  # products
    total += _mixing(s, config, outputs=n, inputs=m + n) + s.stream_downcast
    if not _predicts(config):
        return total + Traffic(s.all, s.all) + Traffic(s.all, s.gamma + s.matrix)
    total += _torch_coefficients(s, config) + Traffic(s.gamma + s.matrix, s.gamma + s.matrix)
    if isinstance(config, ManifoldConfig):
        return total + _mapping_backward(s, config)
    return total + _prediction_backward(s, config)


def _torch_depth(s: _Sizes, config: Config) -> Moves:
    """Forward mixes h, r rows read and written, and adds beta*o in place, r + 1 and r.

    Backward multiplies g and o, r + 1 and r rows, and sums that, r. Then it multiplies g and beta: of one turn in
    place, 1 and 1; of more by mixing, r read and 1 written.
    """
    n, m = config.slots, config.fractions
    forward = s.stream_upcast + Traffic(s.matrix, s.matrix) + _mixing(s, config, outputs=n, inputs=n)
    forward += Traffic(s.slots + s.row + s.one, s.slots) + s.stream_downcast
    backward = s.stream_upcast + Traffic(s.slots + s.row, s.slots) + Traffic(s.slots, s.one)
    if n == m:
        backward += Traffic(s.wide + s.one, s.wide)
    else:
        backward += Traffic(s.one, s.gamma) + _mixing(s, config, outputs=m, inputs=n)
    return Moves(forward, backward + s.downcast, s.row + s.one)


def _predicts(config: Config) -> bool:
    return isinstance(config, ManifoldConfig) or config.dynamic


def _mixing(s: _Sizes, config: Config, outputs: int, inputs: int) -> Traffic:
    """`_mix`, a bag of rows per output: reads rows and weights, the number of every row and the start of every bag."""
    slot = s.slots // config.slots
    numbers = INDEX * outputs * (inputs + 1)
    return Traffic(inputs * slot + FP32 * outputs * inputs + numbers, outputs * slot)


def _torch_coefficients(s: _Sizes, config: Config) -> Traffic:
    """All coefficients in one table, where any is predicted."""
    if isinstance(config, ManifoldConfig):
        return _mapping(s, config)
    if not config.dynamic:
        return Traffic()
    if s.predicted < s.all:  # the static table for every token, and the predicted part added to some of it
        return _prediction(s, config) + Traffic(0, s.all) + Traffic(2 * s.predicted, s.predicted)
    return _prediction(s, config) + Traffic(s.all, s.all)


def _prediction(s: _Sizes, config: PerSlotConfig) -> Traffic:
    """Per slot: statistics of every slot (norm, then four passes over a scalar), projection, scaling, tanh.

    Layernorm centres the slots before: two more reads and a write.
    """
    total = Traffic(s.slots, s.predicted, s.weight, 0)
    if config.norm != "none":
        total += Traffic(s.slots, s.one) + Traffic(s.one, s.one) * 4 + Traffic(s.predicted + s.one, s.predicted)
        total += Traffic(0, 0, s.weight, s.weight) if config.norm_affine else Traffic()
    if config.norm == "layernorm":
        total += Traffic(2 * s.slots + s.one, s.slots + s.one)
    if config.tanh:
        total += Traffic(s.predicted, s.predicted) * 3
    return total


def _prediction_backward(s: _Sizes, config: PerSlotConfig) -> Traffic:
    """Per slot: the coefficients' gradients are laid out as predicted and go back through scale, tanh and norm.

    They add to the gradient of h twice, through the norm and through the projection, and read h for W's.
    """
    total = Traffic(s.all, s.all) + Traffic(s.all, 0)  # laid out; summed for the statics
    if config.tanh or config.scale:
        total += Traffic(2 * s.predicted, s.predicted)
    if config.scale:
        total += Traffic(s.predicted, 0) + Traffic(s.predicted, s.predicted)
    if config.tanh:
        total += Traffic(3 * s.predicted, s.predicted)
    if config.norm != "none":
        total += Traffic(s.predicted + s.one, s.predicted) + Traffic(2 * s.predicted, s.predicted)
        total += Traffic(s.predicted, s.one) + Traffic(3 * s.one, 2 * s.one)
        total += Traffic(2 * s.slots + s.one, s.slots)
        total += Traffic(0, 0, 3 * s.weight, 2 * s.weight) if config.norm_affine else Traffic()
    total += Traffic(s.slots + s.predicted, s.slots, s.weight, 0)
    return total + Traffic(s.slots + s.predicted, 0, 0, s.weight)


def _mapping(s: _Sizes, config: ManifoldConfig) -> Traffic:
    """On a manifold: statistics of the stream, projection, scaling, sigmoids, Sinkhorn, and all in one table.

    A normalisation sums a table, adds eps to the sums, and divides.
    """
    total = Traffic(s.slots, 0) + Traffic(s.slots, s.all, s.weight, 0) + Traffic(s.all, s.all) * 2
    total += Traffic(2 * s.gamma + 2 * s.one, 2 * s.gamma + 2 * s.one)
    total += Traffic(2 * s.matrix, 2 * s.matrix)
    sinkhorn = Traffic(2 * s.matrix + 2 * s.one, s.matrix + 2 * s.one)
    return total + sinkhorn * (2 * config.sinkhorn_iterations - 1) + Traffic(s.all, s.all)


def _mapping_backward(s: _Sizes, config: ManifoldConfig) -> Traffic:
    """On a manifold: the same way back, and to the gradient of h twice, through the norm and through the projection.

    A normalisation multiplies gradient and table, sums, subtracts, divides, and takes the table back.
    """
    total = Traffic(5 * s.gamma + 6 * s.one, 3 * s.gamma + 4 * s.one) + Traffic(s.matrix, s.matrix)
    sinkhorn = Traffic(6 * s.matrix + 3 * s.one, 4 * s.matrix + s.one)
    total += sinkhorn * (2 * config.sinkhorn_iterations - 1)
    total += Traffic(5 * s.matrix + s.one, 2 * s.matrix + s.one)  # softmax
    total += Traffic(s.all, s.all) + Traffic(4 * s.all, s.all) + Traffic(4 * s.all, 3 * s.all)
    total += Traffic(2 * s.slots, s.slots) + Traffic(s.slots + s.all, s.slots, s.weight, 0)
    return total + Traffic(s.slots + s.all, 0, 0, s.weight)


# The readable reference under autograd, megatron_fc/connections/reference.py.


def frac_reference(stream: Stream, config: FracConfig) -> Moves:
    """A layer of `megatron_fc.connections.reference`: in fp32, 50 + 82 rows of DFC and 40 + 56 of SFC, terms left out.

    Width: DFC norms every fraction (1 read, 1 written), projects (1) and mixes (1 and 1); SFC mixes with copies around
    the product (3 and 3). Backward of the mixing reads 3 and writes 1, of the projection reads 1 and writes 1, of the
    norm reads 2 and writes 1, and the two gradients of h are summed. Depth norms and projects twice, for beta and for
    alpha, multiplies beta and o (1 and 1), mixes, and adds (2 and 1); its backward likewise, beta*o's reading 4 and
    writing 2. Width and depth both take h, whose gradients are summed. In 16 bits, h, o and results are converted.

    Predicted coefficients pass through memory for tanh, scale, the static part and their use. Backward goes through
    the same, reads twice for each gradient of a parameter (product and sum), and twice for the projection's.

    Kept: h and o, what was normed and its statistics, the coefficients in use and, for tanh and scale, as predicted.
    """
    s = _Sizes.of(stream, config)
    wide, predicted = s.wide, 1 if config.dynamic else 0
    normed = predicted if config.norm != "none" else 0
    if config.dynamic:
        mixing = Moves(Traffic(wide, wide), Traffic(3 * wide, wide))
    else:
        mixing = Moves(Traffic(3 * wide, 3 * wide), Traffic(5 * wide, 3 * wide))
    prediction = Moves(
        Traffic((normed + predicted) * wide, normed * wide),
        Traffic((2 * normed + 3 * predicted) * wide, (normed + 2 * predicted) * wide),
        normed * (wide + 2 * s.one),
    )
    passes = predicted * (1 + config.tanh + config.scale)
    coefficients = Moves(
        Traffic(passes + predicted, passes + predicted),
        Traffic(5 * predicted + 4 * config.scale * predicted + 2 * config.tanh * predicted, passes + 2 * predicted),
        predicted + (config.tanh or config.scale) * predicted,
    )
    kept = Moves(Traffic(), Traffic(), wide)
    # DFC of an fp32 stream keeps h itself, once; otherwise each product keeps its own copy of it.
    kept_again = Moves(Traffic(), Traffic()) if config.dynamic and s.row == wide else kept
    width = mixing + prediction + kept + Moves(s.upcast + s.downcast, s.upcast + s.downcast)
    # The sum of o's and h's part takes the mixed rows as they lie, without SFC's last copy.
    uncopied = Moves(Traffic() if config.dynamic else Traffic(-wide, -wide), Traffic())
    update = Moves(Traffic(wide, wide) + Traffic(2 * wide, wide), Traffic(4 * wide, 2 * wide), wide)
    depth = mixing + uncopied + prediction * 2 + kept_again + update
    width, depth = width + coefficients * s.matrix, depth + coefficients * (s.matrix + s.one)
    depth += Moves(s.upcast * 2 + s.downcast, s.upcast + s.downcast * 2)
    return (width + norm(stream) + depth + gradient_sum(stream)) * 2


# Hyper-Connections, benchmarks/unfused_hyper.py.


def hyper_unfused(stream: Stream, config: HyperConfig) -> Moves:
    """A layer of Hyper-Connections as the paper lists them, under autograd: at n = 4, 80 + 178 rows of DHC.

    With a norm; terms are left out.

    Per sub-layer, forward: norm (n read, n written), projection (n), mixing (n and n+1), beta*o (1 and n), sum (2n and
    n). Backward: x's gradient joins the streams' (n+1 and n+1), the mixing's two products (2n+1, and n+1 and n); of
    beta*o, g*o (n+1 and n), its sum (n), g*beta (n and n), its sum (n and 1); projection (n and n, the gradient of its
    weights included); norm (2n and n); the sum of its gradient and the mixing's (2n and n). Kept: the streams, normed
    too, what was mixed, of which x is a part that the sub-layer's norm keeps, and o. Where the norm and the projection
    are one pass, as in published counts of 8n+2 rows forward, n fewer are read and written.
    """
    row, n = stream.row, config.slots
    p = 1 if config.dynamic else 0
    forward = Traffic(((2 * p + 3) * n + 1) * row, (p * n + 3 * n + 1) * row)
    backward = Traffic(((5 * p + 8) * n + 4) * row, ((3 * p + 4) * n + 2) * row)
    if n == 1:  # there is nothing to sum for g_o
        backward += Traffic(-row, -row)
    saved = ((2 + p) * n + 1) * row
    return (Moves(forward, backward, saved) + norm(stream)) * 2

"""A model and the way it is trained, as the plain numbers that planning works on."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_fc.connections.base import ConnectionConfig


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention: queries, and keys with values, pass through a narrow layer each.

    Attributes:
        queries: width of the queries' layer, None for a plain product.
        keys: width of that of keys and values.
        position: of a head, the part that is rotated, which all heads of the keys share.
        values: of a head.
    """

    queries: int | None
    keys: int
    position: int
    values: int


@dataclass(frozen=True)
class Shape:
    """A decoder; symbols are those of the formulas.

    Attributes:
        moe_layers: for every layer whether it is a mixture of experts.
        width: d, of sub-layers' inputs and outputs.
        heads, groups, head_size: of attention; groups are the key-value heads, head_size that of queries and keys.
        ffn: f, of a dense layer's MLP.
        experts, top_k, expert_ffn: E, k and f of the routed experts; shared_ffn is that of the shared one, 0 for none;
            shared_gate: a product of width d with one number weighs what the shared one returns.
        vocabulary: V, padded.
        sequence: s, tokens of a sequence.
        gated: the MLP has a gate, as SwiGLU has.
        clamped: the experts' activation clamps its input.
        tied: embedding and output layer share their weights.
        norm_vectors: parameters of a norm in rows of d: 1 for RMSNorm, 2 for LayerNorm.
        qk_norm: queries and keys are normed; over_heads: over all heads at once, not per head.
        norm_after: sub-layers norm what they return, not what they are given.
        rotary: positions rotate queries and keys; learned_positions: else their number, 0 for none.
        linear_bias, qkv_bias: of all linear layers, of the attention's first one.
        connection: between sub-layers, None for plain residuals.
        latent: multi-latent attention, None for the plain one.
        window: tokens that a token attends to in the layers of `windowed`, 0 where no layer has a window.
        predicted: layers of multi-token prediction, each like the last layer of the decoder.
    """

    moe_layers: tuple[bool, ...]
    width: int
    heads: int
    groups: int
    head_size: int
    ffn: int
    vocabulary: int
    sequence: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    shared_gate: bool = False
    gated: bool = True
    clamped: bool = False
    tied: bool = False
    norm_vectors: int = 1
    qk_norm: bool = False
    over_heads: bool = False
    norm_after: bool = False
    rotary: bool = True
    learned_positions: int = 0
    linear_bias: bool = False
    qkv_bias: bool = False
    connection: ConnectionConfig | None = None
    latent: Latent | None = None
    window: int = 0
    windowed: tuple[bool, ...] = ()
    predicted: int = 0

    @property
    def layers(self) -> int:
        return len(self.moe_layers)

    @property
    def is_wide(self) -> bool:
        """Whether the stream between sub-layers is wider than the model."""
        return self.connection is not None and self.connection.is_wide

    @property
    def stream_width(self) -> int:
        """Of the stream between sub-layers: r*d."""
        return self.width if self.connection is None else self.connection.stream_width(self.width)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Of the keys, and of the values where these have no width of their own."""
        return self.groups * self.head_size

    @property
    def value_width(self) -> int:
        """Of the values that attention reads."""
        return self.groups * (self.latent.values if self.latent else self.head_size)

    @property
    def output_width(self) -> int:
        """Of what attention returns to its last product."""
        return self.heads * (self.latent.values if self.latent else self.head_size)

    def kind(self, layer: int) -> "Kind":
        """Of a layer of the decoder."""
        return Kind(self.moe_layers[layer], bool(self.windowed and self.windowed[layer]))

    @property
    def kinds(self) -> "set[Kind]":
        """Of all layers, those of multi-token prediction included."""
        return {self.kind(layer) for layer in range(self.layers)}

    def attended(self, windowed: bool) -> float:
        """Tokens that a token attends to, on average over a sequence; causal attention sees half of it."""
        if not windowed or self.window >= self.sequence:
            return self.sequence / 2
        return self.window * (1 - self.window / (2 * self.sequence))

    @property
    def qk_norm_weights(self) -> int:
        """Of the norms of queries and keys, one weight for each value that has one of its own."""
        if not self.qk_norm or self.latent:
            return 0
        return self.query_width + self.key_width if self.over_heads else 2 * self.head_size

    @property
    def matrices(self) -> int:
        """Products of width d times f in an MLP."""
        return 3 if self.gated else 2


class Kind(NamedTuple):
    """Of a layer: whether it has experts, and whether its attention has a window."""

    moe: bool
    windowed: bool = False


@dataclass(frozen=True)
class Recompute:
    """What is computed again in backward, in Megatron's words.

    Attributes:
        granularity: none, selective or full.
        modules: of selective: core_attn, layernorm, mla_up_proj, moe_act, mlp, moe, shared_experts.
        method: of full: uniform or block.
        layers: of full: as recompute_num_layers.
        connections: option `recompute` of Frac-Connections.
        stream_layers: option of the connections: layers that keep the stream once together, 0 where sub-layers keep it.
    """

    granularity: str = "none"
    modules: tuple[str, ...] = ()
    method: str = "uniform"
    layers: int = 1
    connections: bool = False
    stream_layers: int = 0

    @property
    def freed(self) -> tuple[str, ...]:
        """Modules of selective recompute; `stream` for that of the stream, whose groups keep it once each."""
        modules = self.modules if self.granularity == "selective" else ()
        return (*modules, "stream") if self.stream_layers else modules

    def spans(self, layers: range) -> list[range]:
        """Layers of a model chunk that full recompute runs again, those between two kept streams together."""
        if self.granularity != "full":
            return []
        if self.method == "block":
            return [range(index, index + 1) for index in layers[: self.layers]]
        return [layers[at : at + self.layers] for at in range(0, len(layers), self.layers)]

    def groups(self, layers: range) -> list[range]:
        """Layers of a model chunk that keep the stream once together."""
        if not self.stream_layers:
            return []
        return [layers[at : at + self.stream_layers] for at in range(0, len(layers), self.stream_layers)]

    def __str__(self) -> str:
        words = {"none": "none", "selective": f"selective {', '.join(self.modules)}", "full": "full"}
        stream = f", stream of {self.stream_layers} layers" if self.stream_layers else ""
        return words[self.granularity] + (", connections" if self.connections else "") + stream


Products = Literal["half", "fp8", "fp4"]


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as memory and time depend on it.

    Attributes:
        element_bytes: of a weight and of an activation; connections keep their own parameters in fp32.
        gradient_bytes, master_bytes, moment_bytes: of a parameter's gradient, of its fp32 copy (none where the weight
            is fp32 itself), of both moments together.
        distributed_optimizer: master weights and moments are divided among data-parallel ranks.
        shard_gradients, shard_weights: Megatron-FSDP divides these too, and gathers a layer's weights for each pass.
        sequence_parallel: norms and residual stream are divided among tensor-parallel ranks.
        products: precision in which linear layers multiply.
        tensor_scales: FP8 has a scale for each tensor, by its largest value, and not for each block.
        transposes: the GPU's FP8 multiplies rows with rows alone (Hopper), so that columns are transposed copies.
        flash: attention keeps no scores; False is Megatron's unfused one.
        norms_apart: which sub-layers' norms are modules of their own, and not Transformer Engine's part of the product
            behind them: of attention, dense MLP, MoE.
        fused_loss: Transformer Engine's cross entropy turns logits into their gradient in place.
        fp8_output: the output layer multiplies as other layers do.
        fused_experts: one kernel runs an expert's products with activation, clamp and bias.
        sends_once: the experts' dispatcher sends a token once to each rank, and once to each other node, that has some
            of its experts (DeepEP, HybridEP); else once for each expert.
        offloaded: layers of a chunk whose activations wait in the host's memory.
        fused_connections: connections run as fused kernels, which apply the norms apart in the same pass.
        main_kernels: of these their own ones, not the general.
        fused_residual: plain residuals use Megatron's `fused_residual_rmsnorm`.
        overlap_grad_reduce, overlap_param_gather, overlap_tensor, overlap_experts: which communication Megatron lets
            run beside computation: data-parallel, tensor-parallel, the experts' all-to-all.
        captured: modules whose launches CUDA graphs hold, in Megatron's words; `all` for those of a whole step.
        group: micro-batches that a pipeline rank runs through one chunk before the next, None for as many as stages.
        target_tokens: of the run.
    """

    element_bytes: int = 2
    gradient_bytes: int = 4
    master_bytes: int = 4
    moment_bytes: int = 8
    distributed_optimizer: bool = True
    shard_gradients: bool = False
    shard_weights: bool = False
    sequence_parallel: bool = True
    recompute: Recompute = Recompute()
    products: Products = "half"
    tensor_scales: bool = False
    transposes: bool = False
    flash: bool = True
    norms_apart: tuple[bool, bool, bool] = (False, False, True)
    fused_loss: bool = False
    fp8_output: bool = False
    fused_experts: bool = False
    sends_once: bool = False
    offloaded: int = 0
    fused_connections: bool = True
    main_kernels: bool = True
    fused_residual: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_tensor: bool = False
    overlap_experts: bool = False
    captured: tuple[str, ...] = ()
    group: int | None = None
    target_tokens: int = 0

    def norms_of(self, moe: bool) -> tuple[bool, bool]:
        """Whether the norms of a layer are modules of their own: attention's, its MLP's or experts'."""
        attention, dense, experts = self.norms_apart
        return attention, experts if moe else dense

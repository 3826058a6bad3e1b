"""The model of network traffic: the bytes of every collective of a training step, from plain integers.

Symbols: t tokens of a micro-batch on a rank before tensor parallelism, d the width of the model, e the bytes of a
value; "the activation" that a sub-layer takes or returns is t x d x e bytes. Connections add their parameters'
gradients and weights to the data-parallel sums and, under sequence parallelism, to the tensor-parallel one. Pipeline
stages send the stream, r activations: one of Frac-Connections, n of Hyper-Connections.

Not modelled are a few bytes a step, for norms of gradients, losses to report and counts of tokens, and what Megatron
can be told to send in FP8 or past torch.distributed (DeepEP, NVSHMEM, Transformer Engine's user buffers).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_fc.errors import UserError
from megatron_fc.planning.counts import NetworkCount, NetworkCounts, NetworkKey, Phase
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.parameters import Parameters, embedding, share_of_stage
from megatron_fc.planning.placement import Placement
from megatron_fc.planning.ring import ring_all_gather_bytes, ring_all_reduce_bytes, ring_reduce_scatter_bytes
from megatron_fc.planning.shape import Kind, Shape, Training

_RING = {
    "all_gather": ring_all_gather_bytes,
    "reduce_scatter": ring_reduce_scatter_bytes,
    "all_reduce": ring_all_reduce_bytes,
}
_FP32_BYTES = 4
_INT64_BYTES = 8


@dataclass(frozen=True)
class Routing:
    """Tokens of one MoE layer and step that a rank exchanges with every rank of its expert-parallel group.

    Attributes:
        sent: this rank's tokens for the experts of each of them, itself included.
        received: tokens of each of them for this rank's experts.
    """

    sent: Sequence[float]
    received: Sequence[float]


def network_bytes(
    shape: Shape,
    layout: Layout,
    training: Training,
    rank: int,
    *,
    routing: Mapping[int, Routing] | None = None,
    router_bytes: int = _FP32_BYTES,
    balance_loss: bool = True,
) -> NetworkCounts:
    """What one rank sends in one step of training.

    Keys are those of the counter, `megatron_fc.profiling.counters.network`: sends between pipeline stages and, unless
    they overlap, gradients are neither in forward nor in backward, hence in phase `optimizer`. Calls are counted as if
    every model chunk had one bucket of gradients of a dtype.

    Args:
        shape: the model.
        layout: parallel sizes, nodes and batch.
        training: precisions, optimizer, recompute.
        rank: in the world; ranks of one pipeline stage differ in their neighbours alone, and in routing.
        routing: by layer, where it is known; elsewhere every expert gets as many tokens as the others.
        router_bytes: of a token's probability for an expert, `moe_router_dtype`.
        balance_loss: the router has a loss that counts tokens over tensor- and context-parallel ranks.

    Raises:
        UserError: experts under tensor parallelism without sequence parallelism.
    """
    if layout.tensor > 1 and any(shape.moe_layers) and not training.sequence_parallel:
        raise UserError(
            f"tensor_model_parallel_size={layout.tensor} with experts needs sequence_parallel: Megatron trains no "
            f"experts without it, set it to true"
        )
    step = _Step(shape, layout, training, rank)
    step.pipeline()
    step.data_parallel()
    step.replicated_gradients()
    step.tied_embeddings()
    is_first, is_last = step.at.stage == 0, step.at.stage == layout.pipeline - 1
    if is_first:
        step.embedding()
    if is_last:
        step.output_and_loss()
    modules = training.recompute.freed

    def layer_of(kind: Kind, again: bool, rows: Routing | None) -> None:
        step.attention(again)
        step.context_parallel(again or "core_attn" in modules)
        if not kind.moe:
            step.mlp(again or "mlp" in modules)
            return
        if shape.shared_ffn:
            step.mlp(again or "moe" in modules or "shared_experts" in modules)
        step.experts(rows or step.balanced(), again or "moe" in modules, router_bytes, balance_loss)

    for chunk in layout.chunks(step.at.stage):
        recomputed = {layer for span in training.recompute.spans(chunk.layers) for layer in span}
        for layer in chunk.layers:
            layer_of(shape.kind(layer), layer in recomputed, (routing or {}).get(layer))
        for _ in range(shape.predicted * chunk.prediction):
            step.join()
            layer_of(shape.kind(shape.layers - 1), False, None)
            step.output_and_loss()
    return step.counts


class _Step:
    """Collects the traffic of one rank; a method for each part of Megatron that sends."""

    def __init__(self, shape: Shape, layout: Layout, training: Training, rank: int) -> None:
        self.shape, self.layout, self.training = shape, layout, training
        self.at = Placement(layout, rank)
        self.counts: NetworkCounts = {}
        self.micro_batches = layout.accumulation_steps
        self.tokens = layout.micro_batch * shape.sequence // layout.context
        self.activation_bytes = self.tokens * shape.width * training.element_bytes
        chunks = share_of_stage(shape, layout, self.at.stage)
        self.parameters = sum(chunks, start=Parameters())
        # Megatron divides tokens among tensor-parallel ranks between sub-layers, or has them whole on all.
        self.is_divided = training.sequence_parallel and layout.tensor > 1

    def embedding(self) -> None:
        """VocabParallelEmbedding.forward sums the partial embeddings, into divided tokens or on all ranks.

        Backward of the divided form gathers the gradient; autograd has nothing to send for the other.
        """
        if self.is_divided:
            self._ring("forward", "tp", "reduce_scatter", self.activation_bytes, self.micro_batches)
            self._ring("backward", "tp", "all_gather", self.activation_bytes, self.micro_batches)
        else:
            self._ring("forward", "tp", "all_reduce", self.activation_bytes, self.micro_batches)

    def attention(self, again: bool) -> None:
        """Two linear layers, linear_qkv and linear_proj: see `_linear_pair`.

        Norms over all heads add up a number per token for the queries and one for the keys
        (`megatron_fc.megatron.norm_over_heads`).
        """
        self._linear_pair(again)
        if self.shape.over_heads:
            for phase in (*_forward_phases(again), "backward"):
                self._ring(phase, "tp", "all_reduce", self.tokens * _FP32_BYTES, 2 * self.micro_batches)

    def join(self) -> None:
        """Multi-token prediction embeds its tokens and joins them with the stream, a ColumnParallelLinear.

        Its input has twice the width; its output is gathered and, under sequence parallelism, divided again.
        """
        self.embedding()
        if self.is_divided:
            self._ring("forward", "tp", "all_gather", 2 * self.activation_bytes, self.micro_batches)
            self._ring("backward", "tp", "reduce_scatter", 2 * self.activation_bytes, self.micro_batches)
            self._ring("backward", "tp", "all_gather", self.activation_bytes, self.micro_batches)
        else:
            self._ring("backward", "tp", "all_reduce", 2 * self.activation_bytes, self.micro_batches)
        self._ring("forward", "tp", "all_gather", self.activation_bytes, self.micro_batches)

    def mlp(self, again: bool) -> None:
        """Two linear layers, linear_fc1 and linear_fc2, of a dense layer or of shared experts: see `_linear_pair`."""
        self._linear_pair(again)

    def _linear_pair(self, again: bool) -> None:
        """ColumnParallelLinear, then RowParallelLinear.

        Without sequence parallelism RowParallelLinear sums its output, and in backward LinearWithGradAccumulation sums
        the gradient of the first one's input: an all-reduce of the activation each. With it, the first gathers its
        input and the second reduce-scatters its output; backward does the opposite for both gradients, and gathers the
        first one's input again for the gradient of its weight, since only the divided one was kept.
        """
        for phase in _forward_phases(again):
            if self.is_divided:
                self._ring(phase, "tp", "all_gather", self.activation_bytes, self.micro_batches)
                self._ring(phase, "tp", "reduce_scatter", self.activation_bytes, self.micro_batches)
            else:
                self._ring(phase, "tp", "all_reduce", self.activation_bytes, self.micro_batches)
        if self.is_divided:
            self._ring("backward", "tp", "all_gather", self.activation_bytes, 2 * self.micro_batches)
            self._ring("backward", "tp", "reduce_scatter", self.activation_bytes, self.micro_batches)
        else:
            self._ring("backward", "tp", "all_reduce", self.activation_bytes, self.micro_batches)

    def context_parallel(self, again: bool) -> None:
        """Keys and values go around the ring of context-parallel ranks (`cp_comm_type` p2p, Megatron's default).

        Transformer Engine's AttnFuncWithCPAndKVP2P: CP - 1 sends of this rank's keys and values in forward; in
        backward as many of them, and as many of their gradients.
        """
        heads = self.shape.key_width + self.shape.value_width
        heads_bytes = heads // self.layout.tensor * self.training.element_bytes
        hops = (self.layout.context - 1) * self.micro_batches
        for phase in _forward_phases(again):
            self._send(phase, "cp", self.tokens * heads_bytes, hops)
        self._send("backward", "cp", self.tokens * heads_bytes, 2 * hops)

    def balanced(self) -> Routing:
        """Every expert gets as many tokens as the others; a sum over the step's micro-batches."""
        tokens = self.tokens // (self.layout.tensor if self.is_divided else 1) * self.micro_batches
        rows = [tokens * self.shape.top_k / self.layout.expert] * self.layout.expert
        return Routing(rows, rows)

    def experts(self, rows: Routing, again: bool, router_bytes: int, balance_loss: bool) -> None:
        """MoEAlltoAllTokenDispatcher and the router's load balancing.

        Forward: counts of tokens per expert are gathered over all ranks that share experts; tokens and their
        probabilities go to the experts' ranks, then to the ranks among which an expert is divided; results come back
        the same way. Backward is the opposite of each. With both EP and ETP above 1 the ranks of an expert are taken to
        receive as many tokens each. `get_tokens_per_expert_and_token_count` sums the counts for the balancing loss,
        which the router leaves to recompute where there is any.
        """
        calls, layout = self.micro_batches, self.layout
        row_bytes = self.shape.width * self.training.element_bytes
        divided_rows = sum(rows.received) * layout.expert_tensor
        counts_bytes = self.shape.experts * _INT64_BYTES
        if balance_loss:
            self._ring("recompute" if again else "forward", "tp-cp", "all_reduce", counts_bytes, calls)
        for phase in _forward_phases(again):
            self._ring(phase, "etp-ep", "all_gather", counts_bytes * self.at.size("etp-ep"), calls)
            self._exchange(phase, rows.sent, row_bytes, calls)
            self._exchange(phase, rows.sent, router_bytes, calls)
            self._ring(phase, "etp", "all_gather", round(divided_rows * row_bytes / calls), calls)
            self._ring(phase, "etp", "all_gather", round(divided_rows * router_bytes / calls), calls)
            self._ring(phase, "etp", "reduce_scatter", round(divided_rows * row_bytes / calls), calls)
            self._exchange(phase, rows.received, row_bytes, calls)
        self._exchange("backward", rows.sent, row_bytes, calls)
        self._ring("backward", "etp", "all_gather", round(divided_rows * row_bytes / calls), calls)
        self._ring("backward", "etp", "reduce_scatter", round(divided_rows * row_bytes / calls), calls)
        self._ring("backward", "etp", "reduce_scatter", round(divided_rows * router_bytes / calls), calls)
        self._exchange("backward", rows.received, row_bytes, calls)
        self._exchange("backward", rows.received, router_bytes, calls)

    def output_and_loss(self) -> None:
        """The output layer, a ColumnParallelLinear, and VocabParallelCrossEntropy.

        The layer is the first half of `_linear_pair`. The loss sums three fp32 numbers per token: the largest logit,
        the label's logit, the sum of exponentials; the fused form sends the last two at once.
        """
        if self.is_divided:
            self._ring("forward", "tp", "all_gather", self.activation_bytes, self.micro_batches)
            self._ring("backward", "tp", "all_gather", self.activation_bytes, self.micro_batches)
            self._ring("backward", "tp", "reduce_scatter", self.activation_bytes, self.micro_batches)
        else:
            self._ring("backward", "tp", "all_reduce", self.activation_bytes, self.micro_batches)
        self._ring("forward", "tp", "all_reduce", self.tokens * _FP32_BYTES, 3 * self.micro_batches)

    def pipeline(self) -> None:
        """P2PCommunicator: the stream after every chunk but the last, its gradient before every chunk but the first.

        The stream is r activations, and stages exchange it whole (`megatron_fc.megatron.stream`).
        Chunks are dealt out in turn, so that the last stage sends the outputs of all its chunks but one to the first
        stage. Under sequence parallelism a rank sends its part of the tokens.
        """
        pipeline, chunks = self.layout.pipeline, self.layout.virtual_pipeline
        if pipeline == 1:
            return
        stream_bytes = self.activation_bytes * self.shape.stream_width // self.shape.width
        part_bytes = stream_bytes // (self.layout.tensor if self.is_divided else 1)
        outputs = chunks if self.at.stage < pipeline - 1 else chunks - 1
        gradients = chunks if self.at.stage > 0 else chunks - 1
        self._send("optimizer", "pp", part_bytes, outputs * self.micro_batches)
        self._send("optimizer", "pp", part_bytes, gradients * self.micro_batches, step=-1)

    def data_parallel(self) -> None:
        """DistributedDataParallel sums gradients once a step; the distributed optimizer divides them and the weights.

        Experts that lie on other ranks than all else (EP above 1, or ETP not TP) are summed over those that hold the
        same ones, all else over data- and context-parallel ranks. Connections keep fp32 weights. Megatron pads
        the divided buffers: each parameter starts at a multiple of 64 elements, a bucket ends at a multiple of DP and
        128; left out here.
        """
        own, element_bytes = self.parameters, self.training.element_bytes
        has_own_group = self.layout.expert > 1 or self.layout.expert_tensor != self.layout.tensor
        dense = own.split + own.whole + (0 if has_own_group else own.experts)
        self._gradients("dp-cp", dense, element_bytes)
        self._gradients("dp-cp", own.connections, _FP32_BYTES)
        if has_own_group:
            self._gradients("expert_dp", own.experts, element_bytes)

    def _gradients(self, kinds: str, parameters: int, weight_bytes: int) -> None:
        training = self.training
        backward: Phase = "backward" if training.overlap_grad_reduce else "optimizer"
        forward: Phase = "forward" if training.overlap_param_gather else "optimizer"
        gradient_bytes = parameters * training.gradient_bytes
        if training.distributed_optimizer:
            # Sharded weights are gathered for either pass of every micro-batch, sharded gradients summed after each.
            gathers = self.micro_batches if training.shard_weights else 1
            self._ring(
                backward,
                kinds,
                "reduce_scatter",
                gradient_bytes,
                self.micro_batches if training.shard_gradients else 1,
            )
            self._ring(forward, kinds, "all_gather", parameters * weight_bytes, gathers)
            if training.shard_weights:
                self._ring("backward", kinds, "all_gather", parameters * weight_bytes, gathers)
        else:
            self._ring(backward, kinds, "all_reduce", gradient_bytes)

    def replicated_gradients(self) -> None:
        """_allreduce_non_tensor_model_parallel_grads: of parameters that tensor-parallel ranks apply to other tokens.

        Under sequence parallelism norms, routers, biases and connections; the norms of queries and keys always,
        since ranks have other heads.
        """
        own, training = self.parameters, self.training
        if self.is_divided:
            replicated = own.whole + own.connections
        else:
            layers = sum(len(chunk.layers) for chunk in self.layout.chunks(self.at.stage))
            replicated = self.shape.norm_vectors * self.shape.qk_norm_weights * layers
        self._ring("optimizer", "tp", "all_reduce", replicated * training.gradient_bytes)

    def tied_embeddings(self) -> None:
        """_allreduce_word_embedding_grads: first and last stage have a copy of tied embeddings each."""
        last = self.layout.pipeline - 1
        if not self.shape.tied or last == 0 or self.at.stage not in (0, last):
            return
        share = embedding(self.shape).split // self.layout.tensor
        whole = share * self.training.gradient_bytes
        to = self.at.peer("pp", last - self.at.stage)
        self._add(NetworkKey("optimizer", "embedding", "all_reduce"), 1, whole, {to: ring_all_reduce_bytes(whole, 2)})

    def _ring(self, phase: Phase, kinds: str, collective: str, whole_bytes: int, calls: int = 1) -> None:
        size = self.at.size(kinds)
        if size > 1 and whole_bytes:
            sent = {self.at.following(kinds): calls * _RING[collective](whole_bytes, size)}
            self._add(NetworkKey(phase, self.at.name(kinds), collective), calls, calls * whole_bytes, sent)

    def _send(self, phase: Phase, kind: str, part_bytes: int, calls: int, step: int = 1) -> None:
        if calls:
            to = self.at.peer(kind, self.at.coordinate(kind) + step)
            self._add(NetworkKey(phase, kind, "send"), calls, calls * part_bytes, {to: calls * part_bytes})

    def _exchange(self, phase: Phase, rows: Sequence[float], row_bytes: int, calls: int) -> None:
        own = self.at.coordinate("ep")
        sent = {self.at.peer("ep", to): round(count * row_bytes) for to, count in enumerate(rows) if to != own}
        if not sent:
            return
        if self.training.sends_once:
            sent = self._once(sent)
        self._add(NetworkKey(phase, "ep", "all_to_all"), calls, sum(sent.values()), sent)

    def _once(self, sent: Mapping[int, int]) -> dict[int, int]:
        """Of a balanced exchange, what is left where a token goes once to each node, and there once to each rank.

        Of R ranks a token's k experts are on R (1 - (1 - 1/R)^k). What comes from other nodes goes on inside of this
        one: as much as its ranks send out.
        """
        ranks, choices = self.layout.expert, self.shape.top_k
        nodes = max(ranks // (sum(self.at.is_on_this_node(to) for to in sent) + 1), 1)
        inside, outside = nodes * _distinct(ranks, choices) / choices, _distinct(nodes, choices) / choices
        return {to: round(size * (inside if self.at.is_on_this_node(to) else outside)) for to, size in sent.items()}

    def _add(self, key: NetworkKey, calls: int, payload_bytes: int, sent_bytes: Mapping[int, int]) -> None:
        count = self.counts.setdefault(key, NetworkCount())
        intra_node = sum(sent for to, sent in sent_bytes.items() if self.at.is_on_this_node(to))
        count.add(NetworkCount(calls, payload_bytes, intra_node, sum(sent_bytes.values()) - intra_node))


def _distinct(places: int, choices: int) -> float:
    """Places that at least one of some even choices falls on."""
    return places * (1 - (1 - 1 / places) ** choices)


def _forward_phases(again: bool) -> Iterable[Phase]:
    return ("forward", "recompute") if again else ("forward",)

"""OLMoE and OLMo2 with connections in place of residuals: Frac-Connections, Hyper-Connections, mHC and mFC.

A stream of n slots of width d/m takes the place of the residual stream. Around every attention and MLP::

    x_i  = sum_j gamma_ji h_j                                     i = 1..m   what the sub-layer reads
    h'_j = beta_j o_((j-1) mod m + 1) + sum_k alpha_kj h_k        j = 1..n   what becomes of the stream

Row index of gamma and alpha: source slot, column: destination. Sources: arXiv 2503.14125 (Frac-Connections, n = m),
2409.19606 (Hyper-Connections, m = 1), 2512.24880 (coefficients on a manifold). Coefficients and mixing are fp32.

All else is transformers' own: attention, experts, rotary positions, cache, generation. The `hidden_states` of layers
are the stream, [batch, sequence, n*d/m].
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2DecoderLayer,
    Olmo2ForCausalLM,
    Olmo2Model,
    Olmo2PreTrainedModel,
    Olmo2RMSNorm,
    Olmo2RotaryEmbedding,
)
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeDecoderLayer,
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoePreTrainedModel,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
)

from .configuration_connected_olmo import ConnectedOlmo2Config, ConnectedOlmoeConfig

# Modules whose parameters stay fp32 in a half-precision model.
_FP32 = ["attn_connection", "mlp_connection", "leave"]


class Connection(nn.Module, ABC):
    """One site. Its parameters are reached by calling it alone, so that they may be offloaded.

    Args:
        hidden_size: d.
        options: `connection` of the configuration.
        sub_layer: number of the sub-layer in the network, from 0.
    """

    def __init__(self, hidden_size: int, options: dict[str, Any], sub_layer: int) -> None:
        super().__init__()
        self.options, self.sub_layer = options, sub_layer
        self.slots, self.fractions = options["slots"], options["fractions"]
        for name, shape in self.shapes(hidden_size).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    @abstractmethod
    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by name."""

    @abstractmethod
    def init_weights(self) -> None:
        """Set the parameters as a fresh model has them."""

    @abstractmethod
    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gamma [..., n, m], beta [..., n] and alpha [..., n, n] for slots [..., n, c]."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stream [..., n*c] -> the sub-layer's input [..., d], and beta and alpha for `carry`."""
        with torch.autocast(h.device.type, enabled=False):
            s = h.float().unflatten(-1, (self.slots, -1))
            gamma, beta, alpha = self.coefficients(s)
            return _mix(gamma, s).flatten(-2).to(h.dtype), beta, alpha


class PerSlotConnection(Connection):
    """Frac- and Hyper-Connections: row j of every table comes from slot j alone."""

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        n, m, options = self.slots, self.fractions, self.options
        beta, alpha = options["dynamic_beta"], options["dynamic_alpha"]
        shapes: dict[str, tuple[int, ...]] = {"static_beta": (n,), "static_gamma": (n * m,), "static_alpha": (n * n,)}
        if beta or alpha:
            shapes["dynamic_weight"] = (beta + alpha * (m + n), hidden_size // m)
            if options["scale"]:
                shapes |= {"scale_beta": (1,)} if beta else {}
                shapes |= {"scale_alpha": (1,)} if alpha else {}
            if options["norm"] != "none" and options["norm_affine"]:
                shapes["norm_weight"] = (hidden_size // m,)
        return shapes

    def init_weights(self) -> None:
        """beta 1, alpha the identity, each fraction read from one slot, nothing dynamic."""
        n, m = self.slots, self.fractions
        gamma, first = torch.zeros(n, m), self.sub_layer % n if m == 1 else 0
        gamma[first : first + m].diagonal().fill_(1)
        start = {"static_beta": torch.ones(n), "static_gamma": gamma.flatten(), "static_alpha": torch.eye(n).flatten()}
        for name, parameter in self.named_parameters():
            if name in start:
                init.copy_(parameter, start[name])
            else:
                scale = self.options["initial_scale"]
                values = {"dynamic_weight": 0.0, "scale_beta": scale, "scale_alpha": scale, "norm_weight": 1.0}
                init.constant_(parameter, values[name])

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, m, options = self.slots, self.fractions, self.options
        gamma, alpha = self.static_gamma.view(n, m), self.static_alpha.view(n, n)
        beta = self.static_beta
        if hasattr(self, "dynamic_weight"):
            z = F.linear(self._normed(s), self.dynamic_weight)
            z = torch.tanh(z) if options["tanh"] else z
            if options["dynamic_beta"]:
                beta = beta + self._scaled(z[..., 0], "scale_beta")
            if options["dynamic_alpha"]:
                dynamic = self._scaled(z[..., -(m + n) :], "scale_alpha")
                gamma, alpha = gamma + dynamic[..., :m], alpha + dynamic[..., m:]
        return gamma, beta, alpha

    def _scaled(self, z: Tensor, name: str) -> Tensor:
        return getattr(self, name) * z if self.options["scale"] else z

    def _normed(self, s: Tensor) -> Tensor:
        shape, weight, eps = s.shape[-1:], getattr(self, "norm_weight", None), self.options["norm_eps"]
        if self.options["norm"] == "none":
            return s
        if self.options["norm"] == "rmsnorm":
            return F.rms_norm(s, shape, weight, eps)
        return F.layer_norm(s, shape, weight, None, eps)


class ManifoldConnection(Connection):
    """mHC and mFC: sigmoids and a doubly stochastic alpha, predicted from the whole stream."""

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        n, m = self.slots, self.fractions
        rows = n * m + n + n * n
        return {"mapping_weight": (rows, n * hidden_size // m), "mapping_bias": (rows,), "mapping_scale": (3,)}

    def init_weights(self) -> None:
        """A random mapping, without which all streams would stay equal; slots of mFC start close to themselves."""
        n, m = self.slots, self.fractions
        init.xavier_uniform_(self.mapping_weight)
        init.constant_(self.mapping_scale, 0.01)
        bias = torch.zeros(n * m + n + n * n)
        if n == m > 1:
            identity = 8 * torch.eye(n).flatten() - 4
            bias = torch.cat([identity, torch.zeros(n), identity])
        init.copy_(self.mapping_bias, bias)

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, m, eps = self.slots, self.fractions, self.options["sinkhorn_eps"]
        stream = s.flatten(-2)
        u = F.rms_norm(stream, stream.shape[-1:], None, self.options["norm_eps"])
        sizes = (n * m, n, n * n)
        z, bias = F.linear(u, self.mapping_weight).split(sizes, -1), self.mapping_bias.split(sizes)
        gamma, beta, alpha = (scale * part + b for scale, part, b in zip(self.mapping_scale, z, bias, strict=True))
        gamma = torch.sigmoid(gamma).unflatten(-1, (n, m)) + eps
        return gamma, 2 * torch.sigmoid(beta), self._sinkhorn(alpha.unflatten(-1, (n, n)), eps)

    def _sinkhorn(self, logits: Tensor, eps: float) -> Tensor:
        table = torch.softmax(logits, -1) + eps
        table = table / (table.sum(-2, keepdim=True) + eps)
        for _ in range(self.options["sinkhorn_iterations"] - 1):
            table = table / (table.sum(-1, keepdim=True) + eps)
            table = table / (table.sum(-2, keepdim=True) + eps)
        return table


class Leave(nn.Module):
    """The end of the stack: fraction i is the mean of the slots that stand for it, or a learned sum of the streams."""

    def __init__(self, hidden_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.options, self.slots = options, options["slots"]
        self.copies = options["slots"] // options["fractions"]
        self.is_learned = options.get("leave", "mean") == "learned"
        if self.is_learned:
            shapes = {"leave_weight": (self.slots, self.slots * hidden_size), "leave_bias": (self.slots,)}
            for name, shape in {**shapes, "leave_scale": (1,)}.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def init_weights(self) -> None:
        if self.is_learned:
            init.xavier_uniform_(self.leave_weight)
            init.zeros_(self.leave_bias)
            init.constant_(self.leave_scale, 0.01)

    def forward(self, h: Tensor) -> Tensor:
        """Stream [..., n*c] -> [..., d]."""
        if not self.is_learned:
            return h if self.copies == 1 else h.unflatten(-1, (self.copies, -1)).mean(-2)
        with torch.autocast(h.device.type, enabled=False):
            stream = h.float()
            u = F.rms_norm(stream, stream.shape[-1:], None, self.options["norm_eps"])
            z = self.leave_scale * F.linear(u, self.leave_weight) + self.leave_bias
            weights = torch.sigmoid(z) + self.options["sinkhorn_eps"]
            return (weights.unsqueeze(-1) * stream.unflatten(-1, (self.slots, -1))).sum(-2).to(h.dtype)


class LeavingNorm(nn.Module):
    """The final norm, in front of which the stream is left."""

    def __init__(self, norm: nn.Module, leave: Leave) -> None:
        super().__init__()
        self.norm, self.leave = norm, leave

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.leave(h))


def _mix(weights: Tensor, s: Tensor) -> Tensor:
    return torch.einsum("...ij,...ic->...jc", weights, s)


def enter(h: Tensor, options: dict[str, Any]) -> Tensor:
    """[..., d] -> stream [..., n*c]: every slot is the fraction that it stands for."""
    return h.repeat(*(1,) * (h.dim() - 1), options["slots"] // options["fractions"])


def carry(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor, options: dict[str, Any]) -> Tensor:
    """The next stream [..., n*c] from the sub-layer's output [..., d], the stream, and what a `Connection` returned."""
    with torch.autocast(h.device.type, enabled=False):
        s, written = (t.float().unflatten(-1, (options["slots"], -1)) for t in (h, enter(o, options)))
        return (beta.unsqueeze(-1) * written + _mix(alpha, s)).flatten(-2).to(h.dtype)


def _site(config: Any, sub_layer: int) -> Connection:
    kind = PerSlotConnection if config.connection["kind"] == "per_slot" else ManifoldConnection
    return kind(config.hidden_size, config.connection, sub_layer)


class _ConnectedLayer:
    """A decoder layer with a connection around its attention and its MLP; subclasses say where their norms are."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.options, self.is_first = config.connection, layer_idx == 0
        self.attn_connection = _site(config, 2 * layer_idx)
        self.mlp_connection = _site(config, 2 * layer_idx + 1)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = enter(hidden_states, self.options) if self.is_first else hidden_states
        x, *write = self.attn_connection(h)
        h = carry(self.attend(x, **kwargs), h, *write, self.options)
        x, *write = self.mlp_connection(h)
        return carry(self.feed(x), h, *write, self.options)


class _ConnectedPreTrainedModel:
    _keep_in_fp32_modules_strict = _FP32

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connection | Leave):
            module.init_weights()


class _ConnectedModel:
    """A stack of `layer_class`, of whose stream the final norm, `norm_class`, reads what is left."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = LeavingNorm(norm, Leave(config.hidden_size, config.connection))
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class _ConnectedForCausalLM:
    """A stack of `model_class` and the output layer."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ConnectedOlmoeDecoderLayer(_ConnectedLayer, OlmoeDecoderLayer):
    """Norms what its sub-layers read."""

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.self_attn(self.input_layernorm(x), **kwargs)[0]

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class ConnectedOlmoePreTrainedModel(_ConnectedPreTrainedModel, OlmoePreTrainedModel):
    config: ConnectedOlmoeConfig
    config_class = ConnectedOlmoeConfig
    _no_split_modules: ClassVar = ["ConnectedOlmoeDecoderLayer"]


class ConnectedOlmoeModel(_ConnectedModel, ConnectedOlmoePreTrainedModel, OlmoeModel):
    layer_class, norm_class, rotary_class = ConnectedOlmoeDecoderLayer, OlmoeRMSNorm, OlmoeRotaryEmbedding


class ConnectedOlmoeForCausalLM(_ConnectedForCausalLM, ConnectedOlmoePreTrainedModel, OlmoeForCausalLM):
    model_class = ConnectedOlmoeModel

    def __init__(self, config: ConnectedOlmoeConfig) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok


class ConnectedOlmo2DecoderLayer(_ConnectedLayer, Olmo2DecoderLayer):
    """Norms what its sub-layers return."""

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.post_attention_layernorm(self.self_attn(x, **kwargs)[0])

    def feed(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(x))


class ConnectedOlmo2PreTrainedModel(_ConnectedPreTrainedModel, Olmo2PreTrainedModel):
    config: ConnectedOlmo2Config
    config_class = ConnectedOlmo2Config
    _no_split_modules: ClassVar = ["ConnectedOlmo2DecoderLayer"]


class ConnectedOlmo2Model(_ConnectedModel, ConnectedOlmo2PreTrainedModel, Olmo2Model):
    layer_class, norm_class, rotary_class = ConnectedOlmo2DecoderLayer, Olmo2RMSNorm, Olmo2RotaryEmbedding


class ConnectedOlmo2ForCausalLM(_ConnectedForCausalLM, ConnectedOlmo2PreTrainedModel, Olmo2ForCausalLM):
    model_class = ConnectedOlmo2Model

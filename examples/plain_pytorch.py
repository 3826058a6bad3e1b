"""Connections in a transformer of plain PyTorch: no Megatron, no world of processes.

    python examples/plain_pytorch.py

A connection stands around each sub-layer: it makes the sub-layer's input of the stream, and the next stream of the
sub-layer's output. `enter` and `leave` widen the stream and narrow it again; for Frac-Connections they do nothing. You
should see that every kind trains:

    residual loss 5.7... -> 2.8...
    dfc_x4   loss 5.7... -> 2.8...
    dhc_x4   loss 5.7... -> 2.7...
    mhc_x4   loss 5.7... -> 2.8...
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig

WIDTH, HEADS, LAYERS, VOCABULARY, SEQUENCE = 64, 4, 2, 256, 64
Connection = FracConfig | HyperConfig | ManifoldConfig


class Attention(nn.Module):
    """Causal attention: [batch, sequence, WIDTH] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inputs(x).chunk(3, -1))
        return self.output(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class SubLayer(nn.Module):
    """h + function(norm(h)), or what a connection makes of it."""

    def __init__(self, function: nn.Module, connection: Connection | None) -> None:
        super().__init__()
        self.function, self.norm = function, nn.RMSNorm(WIDTH)
        self.connection = connection.build(WIDTH) if connection else None

    def forward(self, h: Tensor) -> Tensor:
        if self.connection is None:
            return h + self.function(self.norm(h))
        x = self.connection(h)
        return self.connection.depth(self.function(self.norm(x)), h)


class Transformer(nn.Module):
    """Tokens [batch, sequence] to logits [batch, sequence, VOCABULARY]."""

    def __init__(self, connection: Connection | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        functions: list[nn.Module] = []
        for _ in range(LAYERS):
            functions += [Attention(), nn.Sequential(nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, WIDTH))]
        self.layers = nn.ModuleList(SubLayer(function, connection) for function in functions)
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        ends = self.layers[0].connection
        h = ends.enter(h) if ends else h
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(ends.leave(h) if ends else h))


def main() -> None:
    text = (torch.arange(SEQUENCE + 1) + torch.arange(4)[:, None] * 50) % VOCABULARY
    for connection in (None, FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4)):
        torch.manual_seed(1)
        model = Transformer(connection)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(10):
            loss = cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        label = connection.label if connection else "residual"
        print(f"{label:8} loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()

"""Compiles both connections of a site, in a process in which nothing has turned torch.compile off.

python under_compile.py torch    # or triton, in the interpreter
"""

import sys
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.reference import Config

CONFIGS: dict[str, list[Config]] = {
    "torch": [
        FracConfig(backend="torch"),
        FracConfig(backend="torch", dynamic=False),
        FracConfig(backend="torch", norm="layernorm"),
        FracConfig(backend="torch", norm="none", tanh=False, scale=False),
        FracConfig(backend="torch", recompute=True),
        HyperConfig(slots=4, fractions=2, dynamic_beta=False),
        ManifoldConfig(slots=2, sinkhorn_iterations=3),
    ],
    "triton": [FracConfig(backend="triton"), FracConfig(backend="triton", dynamic=False)],
}


def compare(config: Config, dynamic: bool | None) -> None:
    """Not at the initial values, where gradients of the prediction would be zero."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    site: Any = config.build(64)
    for parameter in site.parameters():
        torch.nn.init.normal_(parameter)

    def step(h: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        return site.depth(o + site(h), h)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic)
    for tokens in (5, 7, 9):
        h, o = torch.randn(tokens, config.stream_width(64), requires_grad=True), torch.randn(tokens, 64)
        results = [step(h, o), compiled(h, o)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(y.square().sum(), [h, *site.parameters()]) for y in results]
        for expected, found in zip(*gradients, strict=True):
            assert expected.any()
            torch.testing.assert_close(found, expected)
    # A graph for every shape, or one that is right for the other shapes, perhaps after another try.
    allowed = {False: (3,), None: (2,), True: (1, 2)}[dynamic]
    assert counter.frame_count in allowed, counter.frame_count


if __name__ == "__main__":
    for number, config in enumerate(CONFIGS[sys.argv[1]]):
        # One config in all modes of torch.compile, the others in its default.
        for dynamic in (False, None, True) if number == 0 else (None,):
            compare(config, dynamic)
            print("as without torch.compile:", config, dynamic)

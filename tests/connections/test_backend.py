"""Which backend runs, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fc import FracConfig, FracConnection, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.backend import backend_of
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kernels.availability import triton_obstacle
from support import under_compile
from support.patience import PATIENCE


@pytest.mark.parametrize("kind", [FracConfig, HyperConfig, ManifoldConfig])
def test_auto_takes_triton_on_cuda_and_torch_elsewhere(kind: type[ConnectionConfig]) -> None:
    assert backend_of(kind(), "cuda") == ("triton", "fused kernels")
    chosen, reason = backend_of(kind(), "cpu")
    assert chosen == "torch"
    assert "tensors are on cpu" in reason
    assert backend_of(kind.from_dict({"backend": "torch"}), "cuda")[0] == "torch"


@pytest.mark.parametrize("count", [3, 32])
@pytest.mark.parametrize("kind", [FracConfig, HyperConfig, ManifoldConfig])
def test_slots_without_a_kernel(kind: type[ConnectionConfig], count: int) -> None:
    name = kind.slots_option
    config = kind.from_dict({name: count})
    assert backend_of(config, "cuda")[0] == "torch"
    with pytest.raises(UserError, match=f"the kernels are for {name} 1, 2, 4, 8, 16, not {count}; set backend=auto"):
        backend_of(kind.from_dict({name: count, "backend": "triton"}), "cuda")


def test_triton_on_cpu_tensors_is_an_error() -> None:
    site = FracConnection(64, FracConfig(backend="triton"))
    with pytest.raises(UserError, match="backend=triton cannot run: tensors are on cpu"):
        site(torch.randn(2, 64))


def test_double_precision_has_no_kernel() -> None:
    assert "not torch.float64" in str(triton_obstacle("cuda", torch.float64))


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="unknown backend 'tritn': did you mean 'triton'"):
        FracConfig(backend="tritn")  # type: ignore[arg-type]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    site = FracConnection(48, FracConfig(rate=6))
    with caplog.at_level("INFO", logger="megatron_fc"):
        site.depth(site(h := torch.randn(2, 48)), h)
        site(h)
    assert [record.message for record in caplog.records] == [
        "dfc_x6 connections run on torch: "
        "tensors are on cpu, Triton needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    ]


def test_shapes_strides_and_dtypes_that_do_not_fit() -> None:
    site, h = FracConnection(64, FracConfig()), torch.randn(3, 64)
    cases = [
        (lambda: site(torch.randn(64, 3).t()), r"h has strides \(1, 3\): its last dimension must be contiguous"),
        (lambda: site(torch.randn(3, 63)), "its last dimension must be hidden_size=64"),
        (lambda: site.depth(torch.randn(2, 64), h), "o has shape"),
        (lambda: site.depth(torch.randn(64, 3).t(), h), "o has strides"),
        (lambda: site.depth(h.double(), h), "o is torch.float64 and h torch.float32"),
        (lambda: site.depth(h, h.bfloat16()), "o is torch.float32 and h torch.bfloat16"),
        (
            lambda: site.depth(h, h, bias=torch.ones(3)),
            r"bias has shape \(3,\): its last dimension must be hidden_size=64",
        ),
        (lambda: site.depth(h, h, site(h[:2], hand_over=True)[1]), r"the handover is of a stream of shape \(2, 64\)"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert site.depth(h.bfloat16(), h).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "interpret", "cases"), [("torch", "0", 9), pytest.param("triton", "1", 4, marks=pytest.mark.soak)]
)
def test_under_torch_compile_without_a_graph_break(backend: str, interpret: str, cases: int) -> None:
    """In a process of its own: where the CPU lane is, torch.compile does nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment["TRITON_INTERPRET"] = interpret
    words = [sys.executable, str(Path(under_compile.__file__)), backend]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as without torch.compile: ") == cases

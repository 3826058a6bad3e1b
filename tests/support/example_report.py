"""Parts of a made-up run: 2 stages x 2-way tensor parallelism x 2 replicas of a MoE on two nodes."""

from dataclasses import replace

from megatron_fc.planning.counts import DeviceCount, DeviceCounts, DeviceKey, NetworkCount, NetworkKey
from megatron_fc.profiling.kinds import by_kind
from megatron_fc.profiling.records import Part, Rank, Run, Span

RUN = Run(
    connection="dfc_x4",
    options={"kind": "frac", "rate": 4},
    backend="torch",
    model={
        "family": "gpt",
        "num_layers": 4,
        "hidden_size": 64,
        "seq_length": 128,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "normalization": "RMSNorm",
        "params_dtype": "torch.bfloat16",
        "fp32_residual_connection": False,
    },
    layout={
        "world_size": 8,
        "nodes": 2,
        "tp": 2,
        "pp": 2,
        "vpp": 1,
        "cp": 1,
        "ep": 2,
        "dp": 2,
        "sequence_parallel": True,
    },
    layers=4,
    tokens_per_step=1024,
    from_step=3,
    steps=2,
    parameters=1_234_567,
    device="cpu",
    command="megatron-fc traffic run configs/example.yaml",
    date="2026-01-02T03:04:05+00:00",
    versions={"megatron_fc": "0.1.0", "torch": "2.11.0"},
    git_commit="0123456",
)
WEIGHT = {
    "input_layernorm": 3,
    "self_attention.linear_qkv": 9,
    "self_attention.core_attention": 14,
    "self_attn_bda": 3,
    "pre_mlp_layernorm": 3,
    "mlp.router": 1,
    "mlp.experts": 40,
    "mlp_bda": 3,
}


def device_counts(stage: int, weight: int = 1) -> DeviceCounts:
    """Two layers of a stage, the embedding on the first one and the output on the last one."""
    unit = 4096 * weight
    modules = {f"decoder.layers.{2 * stage + n}.{path}": size for n in (0, 1) for path, size in WEIGHT.items()}
    modules |= {"output_layer": 30, "": 4} if stage else {"embedding.word_embeddings": 2}
    counts: DeviceCounts = {DeviceKey("optimizer", "", "aten._foreach_add_"): DeviceCount(2, 30 * unit, 15 * unit)}
    for path, size in modules.items():
        counts[DeviceKey("forward", path, "aten.mm")] = DeviceCount(8, size * unit, size * unit // 2)
        counts[DeviceKey("backward", path, "aten.mm")] = DeviceCount(16, 2 * size * unit, size * unit)
    return counts


def part(rank: int, connection: str = "dfc_x4", steps: int = 2, weight: int = 1) -> Part:
    """The part of one of the eight ranks."""
    tp, dp, stage = rank % 2, rank // 2 % 2, rank // 4
    device = device_counts(stage, weight)
    network = {
        NetworkKey("forward", "tp", "all_gather"): NetworkCount(8, 8 << 16, 4 << 16, 0),
        NetworkKey("backward", "tp", "reduce_scatter"): NetworkCount(8, 8 << 16, 4 << 16, 0),
        NetworkKey("forward", "ep", "all_to_all"): NetworkCount(8, 3 << 16, 2 << 16, 1 << 16),
        NetworkKey("optimizer", "dp-cp", "all_reduce"): NetworkCount(2, 1 << 17, 1 << 17, 0),
        NetworkKey("optimizer", "pp", "recv"): NetworkCount(8),
    }
    if stage == 0:
        network[NetworkKey("optimizer", "pp", "send")] = NetworkCount(8, 1 << 16, 0, 1 << 16)
    run = RUN if connection != "residual" else replace(RUN, connection=connection, options=None, backend=None)
    return Part(
        run,
        Rank(
            rank,
            f"node{stage}",
            {"tp": tp, "pp": stage, "cp": 0, "ep": dp, "dp": dp},
            step_seconds=[0.084 + 0.004 * rank] * steps,
            timeline=[timeline(1000.0 + 0.1 * step, stage) for step in range(steps)],
            kinds=by_kind(device),
            network=network,
        ),
        device,
    )


def timeline(begin: float, stage: int) -> list[Span]:
    """One forward, one backward, four times, as a pipeline of two stages runs them."""
    spans, at = [], begin + 0.006 * stage
    for number in range(4):
        spans.append(Span("forward", at, at + 0.006))
        spans.append(Span("backward", at + (0.007 if stage else 0.013), at + (0.017 if stage else 0.02)))
        at += 0.0205 if number else 0.02
    return [*spans, Span("optimizer", spans[-1].end, begin + 0.1)]


def parts(connection: str = "dfc_x4", weight: int = 1) -> list[Part]:
    return [part(rank, connection, weight=weight) for rank in range(8)]

"""Training step of the demo's mixture of experts on the CPU, connections against plain residuals, in turns.

    OMP_NUM_THREADS=2 python benchmarks/cpu_step.py --connection dfc_x4 --record

Two models in one process take turns step by step, the order changing every round, so that what else the machine does
falls on both alike. Printed and recorded are ratios of a round's two steps: forward, backward and Adam. The median of
one process is off by up to three hundredths, however many its rounds, presumably by where its memory lies: so there
are several processes, one after another, and the ratio is the median of theirs.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from typing import Any

import torch

import record

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rank import one_rank

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import from_label
from megatron_fc.megatron.output_projections import scale_output_projections
from megatron_fc.megatron.specs import connect

# configs/demo.yaml
SEQUENCE, BATCH, VOCABULARY = 256, 8, 4096


def build(connection: ConnectionConfig | None) -> torch.nn.Module:
    """The demo's model: 4 MoE layers of width 192, 24 experts of which 2 are used."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(1234)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=192,
        num_attention_heads=6,
        ffn_hidden_size=144,
        num_moe_experts=24,
        moe_router_topk=2,
        moe_ffn_hidden_size=144,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.unfused,
    )
    spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if connection is not None:
        scale_output_projections(config, connection)
        spec = connect(spec, connection)
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


class Trainee:
    """A model with its optimizer; `step` trains on one batch and returns seconds of wall and of processor time."""

    def __init__(self, connection: ConnectionConfig | None) -> None:
        self.model = build(connection)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        self.positions = torch.arange(SEQUENCE).expand(BATCH, -1)

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.model(inputs, self.positions, self.mask, labels=labels).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - wall, time.process_time() - processor


def measure(rounds: int, seed: int, label: str) -> dict[str, list[float]]:
    """In this process: per round, the ratio of wall and of processor time, and the residual step's seconds."""
    with one_rank():
        generator = torch.Generator().manual_seed(seed)
        residual, connected = Trainee(None), Trainee(from_label(label))
        results: dict[str, list[float]] = {"wall": [], "processor": [], "residual": []}
        for turn in range(rounds + 2):
            tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
            order = (residual, connected) if turn % 2 else (connected, residual)
            seconds = {trainee: trainee.step(tokens) for trainee in order}
            if turn >= 2:  # the first rounds warm up
                results["wall"].append(seconds[residual][0] / seconds[connected][0])
                results["processor"].append(seconds[residual][1] / seconds[connected][1])
                results["residual"].append(seconds[residual][0])
    return results


def summary(processes: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of processes, and their median."""

    def medians(name: str) -> list[float]:
        return [statistics.median(process[name]) for process in processes]

    return {
        "throughput_ratio_median": round(statistics.median(medians("wall")), 3),
        "throughput_ratio_of_processes": sorted(round(ratio, 3) for ratio in medians("wall")),
        "processor_time_ratio_median": round(statistics.median(medians("processor")), 3),
        "residual_step_ms_median": round(1000 * statistics.median(medians("residual"))),
        "rounds_of_a_process": len(processes[0]["wall"]),
        "threads": torch.get_num_threads(),
        **record.facts("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--connection", default="dfc_x4", help="label of the connections")
    parser.add_argument("--record", action="store_true", help="write it into benchmarks/results")
    args = parser.parse_args()
    spawning = multiprocessing.get_context("spawn")
    results = []
    for seed in range(args.processes):
        with spawning.Pool(1) as pool:
            results.append(pool.apply(measure, (args.rounds, seed, args.connection)))
    result = {"connection": args.connection, **summary(results)}
    print(json.dumps(result, indent=2))
    if args.record:
        record.write(record.RESULTS, f"cpu-step-{args.connection}", result)


if __name__ == "__main__":
    main()

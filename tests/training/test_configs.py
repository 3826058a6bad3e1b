"""The configs of the paper's models: parameters to the digit, schedules, and what Megatron says of each on 64 GPUs."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.preflight.topology import Throughput, Topology, topology
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.recipe import load_recipe
from megatron_fc.training.setup import model_config, parse
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed
from support.training_runs import config as config
from support.training_runs import train

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("olmoe_7b", "olmoe_1b3", "olmo2_1b")


@cache
def parameters(name: str, *overrides: str) -> dict[str, int]:
    """Parameters by name of the full-size model on one rank, built without memory."""
    here = ["mock_data=true", "tokenizer_type=NullTokenizer", "expert_model_parallel_size=1"]
    here += ["no_initialization=true"]
    recipe = load_recipe(CONFIGS / f"{name}.yaml", [*here, *overrides])
    config = model_config(parse(recipe), recipe)
    builder = config.get_builder_cls()(config)
    with torch.device("meta"):
        model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert all(parameter.is_meta for parameter in model.parameters())
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def frac_total(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if is_connection_key(name))


def decoder(layers: int, d: int, ffn: int, experts: int, vocabulary: int) -> int:
    """Parameters of a plain model, by hand: attention, QK norm over heads, router, SwiGLU, norms, two embeddings."""
    layer = 4 * d * d + 2 * d + 2 * d + max(experts, 1) * 3 * d * ffn + experts * d
    return layers * layer + d + 2 * vocabulary * d


# Parameters without Frac-Connections, and those of DFCx4.
EXPECTED = {
    "olmoe_7b": (decoder(16, 2048, 1024, 64, 50304), 165_056),
    "olmoe_1b3": (decoder(12, 1024, 512, 64, 50304), 24 * (256 + 256 * 9 + 36 + 2)),
    "olmo2_1b": (decoder(16, 2048, 8192, 0, 100352), 165_056),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_to_the_digit(name: str) -> None:
    plain, frac = EXPECTED[name]
    counts = parameters(name)
    assert frac_total(counts) == frac
    assert sum(counts.values()) == plain + frac


@pytest.mark.parametrize("name", NAMES)
def test_residual_twin_differs_by_the_connections_alone(name: str) -> None:
    twin, counts = parameters(name, "connection=residual"), parameters(name)
    assert frac_total(twin) == 0
    # Frac-Connections hold the norm of their slot, which changes its name here but not in checkpoints.
    assert sorted(twin.values()) == sorted(count for name, count in counts.items() if not is_connection_key(name))


def test_the_published_models() -> None:
    assert EXPECTED["olmoe_7b"][0] == 6_919_161_856
    assert EXPECTED["olmo2_1b"][0] == 1_484_916_736
    # Per layer Megatron norms each of the 16 heads with one weight of 128.
    per_head = parameters("olmoe_7b", "connection=residual", "qk_layernorm_over_heads=false")
    assert sum(per_head.values()) == 6_919_161_856 - 16 * 2 * (2048 - 128)
    # The 1.3B's depth, heads and expert width are ours: 1.3B and 260M active with the embedding counted once.
    embedding, expert = 50304 * 1024, 3 * 1024 * 512
    once = EXPECTED["olmoe_1b3"][0] - embedding
    assert (once, once - 12 * 56 * expert) == (1_310_639_104, 253_674_496)


@pytest.mark.parametrize(
    ("override", "sites", "per_site"),
    [
        ("connection=sfc", 24, 4 * 9),
        ("rate=2", 24, 512 + 512 * 5 + 2 * 5 + 2),
        ("norm=none", 24, 256 * 9 + 36 + 2),
        ("scale=false", 24, 256 + 256 * 9 + 36),
        ("tanh=false", 24, 256 + 256 * 9 + 36 + 2),
    ],
)
def test_ablations_are_one_override(override: str, sites: int, per_site: int) -> None:
    assert frac_total(parameters("olmoe_1b3", override)) == sites * per_site


def on_nodes(name: str, *overrides: str, nodes: int = 8) -> Topology:
    return topology(CONFIGS / f"{name}.yaml", overrides, nodes, 8, Throughput())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("connection", ["residual", "dfc"])
def test_megatron_accepts_each_on_64_gpus(name: str, connection: str) -> None:
    found = on_nodes(name, f"connection={connection}")
    assert found.unchecked == []
    assert found.tokens == found.target_tokens
    assert found.to_dict()["data_parallel_size"] == 64


@pytest.mark.parametrize(
    ("name", "tokens", "batch", "warmup", "flops"),
    [
        ("olmoe_7b", 3e12, 1024, 10.49e9, 7.87e9),
        ("olmoe_1b3", 500e9, 1024, 10.49e9, 1.82e9),
        ("olmo2_1b", 2e12, 512, 8.39e9, 8.48e9),
    ],
)
def test_batch_and_schedule_in_tokens(name: str, tokens: float, batch: int, warmup: float, flops: float) -> None:
    found = on_nodes(name)
    assert found.layout.global_batch == batch
    assert found.tokens_per_step == batch * 4096
    assert 0 <= found.tokens - tokens < found.tokens_per_step
    assert found.flops_per_token == pytest.approx(flops, rel=1e-3)
    optimizer = load_recipe(CONFIGS / f"{name}.yaml", elsewhere=True).sections["optimizer"]
    assert optimizer["lr_warmup_samples"] * 4096 == pytest.approx(warmup, rel=1e-3)
    assert optimizer["lr_decay_samples"] * 4096 == pytest.approx(5e12, rel=1e-6)


def schedule(name: str, *overrides: str) -> Any:
    """Megatron's own scheduler as the config sets it up: samples seen -> learning rate."""
    sections = load_recipe(CONFIGS / f"{name}.yaml", overrides, elsewhere=True).sections
    values = sections["optimizer"] | sections["model"]  # where overrides of names that the file lacks go
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = OptimizerParamScheduler(
        torch.optim.SGD([parameter]),
        init_lr=values["lr_warmup_init"],
        max_lr=values["lr"],
        min_lr=values["min_lr"],
        lr_warmup_steps=values["lr_warmup_samples"],
        lr_decay_steps=values["lr_decay_samples"],
        lr_decay_style=values["lr_decay_style"],
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=values["train_samples"],
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=values.get("lr_wsd_decay_samples"),
        lr_wsd_decay_style=values.get("lr_wsd_decay_style"),
    )

    def learning_rate(samples: int) -> float:
        scheduler.num_steps = samples
        return float(scheduler.get_lr({}))

    return learning_rate


def test_learning_rate_at_the_ends() -> None:
    lr = schedule("olmoe_7b")
    assert lr(1_280_000) == pytest.approx(2e-4)
    assert lr(2_560_000) == pytest.approx(4e-4)
    assert lr(732_422_144) == pytest.approx(1.648e-4, rel=1e-3)
    assert lr(1_220_703_232) == pytest.approx(4e-5)


def anneal_overrides() -> list[str]:
    """The anneal as docs/configs.md prints it."""
    text = (CONFIGS.parent / "docs" / "configs.md").read_text()
    command = text.split("# anneal\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = command.split()
    assert words[:2] == ["megatron-fc", "train"]
    assert words[2] == "configs/olmoe_7b.yaml"
    return words[3:]


def test_anneal_goes_linearly_from_4e5_to_nothing_over_100b_tokens() -> None:
    overrides = anneal_overrides()
    lr = schedule("olmoe_7b", *overrides)
    begin, end = 1_220_703_232, 1_220_703_232 + 23_842 * 1024
    assert math.isclose((end - begin) * 4096, 100e9, rel_tol=1e-4)
    assert lr(begin) == pytest.approx(4e-5)
    assert lr((begin + end) // 2) == pytest.approx(2e-5)
    assert lr(end) == pytest.approx(0.0, abs=1e-12)
    assert on_nodes("olmoe_7b", *overrides).tokens == end * 4096


def documented(heading: str) -> list[str]:
    """The overrides of the command below a heading of docs/configs.md."""
    text = (CONFIGS.parent / "docs" / "configs.md").read_text().split(heading)[1]
    command = text.split("    megatron-fc train configs/olmoe_7b.yaml ")[1].split("\n\n")[0]
    return command.replace("\\\n", " ").split()


@pytest.mark.slow
def test_the_documented_anneal_trains(config: Path, tmp_path: Path) -> None:
    """The shrunken 7B of docs/configs.md, then its anneal with a tenth of these samples, as the same run."""
    data = yaml.safe_load(config.read_text())["data"]
    here = [f"train_data_path={data['train_data_path']}", f"valid_data_path={data['valid_data_path']}"]
    here += [f"tokenizer_model={data['tokenizer_model']}", f"run_dir={tmp_path}", "eval_iters=0"]
    shrunken = [*documented("## On a machine without GPUs"), "num_layers=1", *here]
    first = [*shrunken, "train_samples=32", "lr_decay_samples=64", "lr_warmup_samples=8", "save_interval=2"]
    seven_b = CONFIGS / "olmoe_7b.yaml"
    train(seven_b, tmp_path, *first)
    anneal = [word.replace("24414208", "16").replace("1245117440", "48") for word in anneal_overrides()]
    assert sum(word.endswith(("samples=48", "samples=16")) for word in anneal) == 3
    printed = train(seven_b, tmp_path, *first, *anneal)["printed"]
    assert "note: changed since iter_0000004: lr 0.0004 -> 4e-05, " in printed
    # From 4e-5 after 32 samples; a rate is logged with the step before it.
    rates = read_metrics(tmp_path).scalars["learning-rate"]
    assert [rates[5], rates[6]] == pytest.approx([2e-5, 0.0], abs=1e-12)

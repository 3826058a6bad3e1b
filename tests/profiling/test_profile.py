"""`megatron-fc traffic run` as a user calls it: real training of a tiny recipe, on one rank and on two."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megatron_fc.cli.main import main
from megatron_fc.planning.counts import total_device
from megatron_fc.profiling.files import read_parts, read_report
from megatron_fc.profiling.report.side_by_side import side_by_side
from megatron_fc.profiling.run_facts import layout, model_facts, paths_in_whole_model
from megatron_fc.runs.log_lines import parse_iteration
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.recipe import load_recipe
from megatron_fc.training.setup import parse
from support import fork_server
from support.training_runs import config as config  # the fixture that makes a tiny config and its data
from support.training_runs import environment

LOSSES = 6  # three steps before the window, two in it, and the one whose beginning ends it


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "megatron_fc")
MPIRUN = ("mpirun", "-n", "2", "--oversubscribe", "--host", "localhost:2", sys.executable, "-m", "megatron_fc.mpi")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def megatron_fc(*words: str, launcher: Sequence[str] = (), **more: str) -> str:
    """Run the command in processes of its own, with more environment; returns what it printed."""
    launcher = launcher or (fork_server.python(), "-m", "megatron_fc")
    variables = environment() | AS_ROOT | {"OMP_NUM_THREADS": "1"} | more
    done = subprocess.run([*launcher, *words], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def residual(config: Path) -> Path:
    """The report of the residual twin."""
    out = config.parent / "traffic-residual"
    megatron_fc("traffic", "run", str(config), "connection=residual", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def profiled(config: Path, residual: Path) -> Path:
    """A report with Frac-Connections, beside its twin."""
    out = config.parent / "traffic"
    printed = megatron_fc("traffic", "run", str(config), "--out", str(out), "--against", str(residual))
    assert f"{out}: traffic.json, traffic.md, traffic.html\n" in printed
    return out


def test_counting_changes_no_loss_and_no_gradient(config: Path, profiled: Path) -> None:
    plain = config.parent / "not-counted"
    megatron_fc("train", str(config), f"run_dir={plain}", f"train_iters={LOSSES}", "save_interval=null", "eval_iters=0")
    counted, expected = read_metrics(profiled).scalars, read_metrics(plain).scalars
    for tag in ("lm loss", "grad-norm", "load_balancing_loss"):
        assert list(counted[tag].values()) == list(expected[tag].values()), tag
        assert len(counted[tag]) == LOSSES


def test_progress_counts_to_the_step_where_it_stops(config: Path, profiled: Path) -> None:
    """The recipe itself would go on for longer."""
    assert int(parse(load_recipe(config, [])).train_iters) > LOSSES
    shown = map(parse_iteration, (profiled / "logs" / "rank0.log").read_text().splitlines())
    steps = [(record["iteration"], record["iterations"]) for record in shown if record]
    assert steps == [(step, LOSSES) for step in range(1, LOSSES + 1)]


@pytest.mark.slow
def test_functions_under_torch_compile_run_uncompiled_in_all_steps(config: Path, profiled: Path) -> None:
    """As the dispatch modes of the counted ones force them to. The CPU lane turns torch.compile off by itself, unless
    it is told not to; with that compiler it would fail."""
    out = config.parent / "not-compiled"
    launcher = (sys.executable, "-m", "megatron_fc")
    compiled = {"TORCHDYNAMO_DISABLE": "0", "CXX": "/bin/false"}
    megatron_fc("traffic", "run", str(config), "--out", str(out), launcher=launcher, **compiled)
    assert read_metrics(out).scalars["lm loss"] == read_metrics(profiled).scalars["lm loss"]


def facts(config: Path, *overrides: str) -> dict[str, Any]:
    args = parse(load_recipe(config, overrides))
    return model_facts(args) | layout(args, ["node"])


def test_runs_of_one_recipe_differ_in_connections_alone(config: Path) -> None:
    plain = facts(config, "connection=residual")
    assert plain == facts(config, "connection=dfc") == facts(config, "connection=sfc", "connections.recompute=true")
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("override", "differing"),
    [
        ("swiglu=false", {"swiglu"}),
        ("position_embedding_type=none", {"position_embedding_type"}),
        ("disable_bias_linear=false", {"add_bias_linear", "add_qkv_bias"}),
        ("fused_residual_rmsnorm=true", {"fused_residual_rmsnorm"}),
        ("fp8_recipe=tensorwise", {"fp8_recipe"}),
        ("attention_backend=flash", {"attention_backend"}),
        ("moe_expert_capacity_factor=1.5", {"moe_expert_capacity_factor"}),
        ("moe_grouped_gemm=true", {"moe_grouped_gemm"}),
        ("cp_comm_type=a2a", {"cp_comm_type"}),
    ],
)
def test_what_differs_in_the_model_is_seen(override: str, differing: set[str], config: Path) -> None:
    plain, other = facts(config, "connection=residual"), facts(config, "connection=residual", override)
    assert {name for name in {**plain, **other} if plain.get(name) != other.get(name)} == differing


def test_the_report_of_one_rank(profiled: Path) -> None:
    report = read_report(profiled)
    assert report.run.connection == "dfc_x4"
    assert (report.run.from_step, report.run.steps, report.run.tokens_per_step) == (3, 2, 4 * 32)
    assert report.run.command.startswith("megatron-fc traffic run ")
    assert report.by_group() == {}
    assert not report.warnings()
    kinds = {key.kind for key in report.by_kind()}
    assert kinds == {"residual stream", "attention", "MoE", "embedding", "output and loss", "optimizer"}
    assert {key.phase for key in report.by_kind()} == {"forward", "backward", "optimizer"}
    (rank,) = report.ranks
    assert len(rank.step_seconds) == 2
    passes = ["forward", "backward"] * 2  # of two micro-batches
    assert [[span.phase for span in step] for step in rank.timeline] == [[*passes, "optimizer"]] * 2
    assert not list(profiled.rglob("checkpoints")), "a profile saves nothing"


def test_frac_connections_add_to_the_residual_stream_alone(profiled: Path, residual: Path) -> None:
    """But for the optimizer's work on their parameters. Experts get other tokens as training goes on."""
    frac, plain = read_report(profiled).by_kind(), read_report(residual).by_kind()
    for key, value in plain.items():
        if key.kind == "residual stream":
            assert frac[key] > 1.2 * value
        elif key.kind in ("attention", "embedding", "output and loss"):
            assert frac[key] == value, key
    page = (profiled / "traffic.html").read_text()
    for label in ("residual <small>counted", "dfc_x4, torch <small>counted", "HC n=4, ideal <small>computed"):
        assert label in page


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["dhc", "mhc"])
def test_the_model_is_what_was_counted(connection: str, config: Path) -> None:
    """Of a whole run, with LayerNorms, which torch runs as one operation on a CPU.

    Left out is that gradients of parameters are added to those of the micro-batch before, once for all tokens.
    """
    out = config.parent / f"traffic-{connection}"
    wide = [
        f"connection={connection}",
        "hidden_size=256",
        "normalization=LayerNorm",
        "micro_batch_size=4",
        f"run_dir={out}",
    ]
    megatron_fc("traffic", "run", str(config), *wide, "--from-step", "1", "--steps", "1", "--out", str(out))
    report = read_report(out)
    label = f"{connection}_x4, torch"
    counted, computed = (s for s in side_by_side(report) if s.label == label)
    assert (counted.is_computed, computed.is_computed) == (False, True)
    for phase in ("forward", "backward"):
        assert computed.phases[phase] == pytest.approx(counted.phases[phase], rel=0.03)
    assert f"{label} <small>counted" in (out / "traffic.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, MPIRUN], ids=["torchrun", "mpirun"])
def test_two_ranks(launcher: Sequence[str], config: Path, request: pytest.FixtureRequest) -> None:
    if launcher is TORCHRUN:
        launcher = (fork_server.python(), *TORCHRUN)
    else:
        pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun not found: apt-get install openmpi-bin")
    out = config.parent / f"traffic-{request.node.callspec.id}"
    words = ("traffic", "run", str(config), f"run_dir={out}", "expert_model_parallel_size=2", "connection=sfc")
    megatron_fc(*words, "--from-step", "1", "--steps", "1", launcher=launcher)
    report = read_report(out)
    assert [(rank.rank, rank.coordinates["ep"]) for rank in report.ranks] == [(0, 0), (1, 1)]
    assert report.run.layout["ep"] == 2
    parts = read_parts(out)
    assert total_device(c for part in parts for c in part.device.values()) == total_device(report.device.values())
    assert report.by_group()["ep"][0] > 0
    assert report.network_bytes_per_token[1] == 0, "one node"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "0"], "--from-step 3 --steps 0: count from step 0 on, one step at least"),
        (["--from-step", "-1"], "--from-step -1 --steps 2: count from step 0 on"),
        (["--against", "/no/report"], "cannot read /no/report/traffic.json, No such file or directory: "),
        (["--nvtx"], "--nvtx is for nsys and ncu, which need a CUDA device: torch sees none"),
        (["hidden_sise=3"], "unknown key in section model: 'hidden_sise': did you mean 'hidden_size'?"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["traffic", "run", str(config), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megatron-fc: {sentence}")
    assert said.count("\n") == 1


def test_a_run_that_ends_before_the_window(config: Path) -> None:
    words = [fork_server.python(), "-m", "megatron_fc", "traffic", "run", str(config), "train_iters=3"]
    words += ["lr_decay_iters=9"]
    out = config.parent / "traffic-short"
    done = subprocess.run([*words, "--out", out], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "megatron-fc: the run ended before step 5 of this start: set --from-step or --steps lower" in done.stderr


def test_a_run_that_cannot_stand_beside_a_report_trains_no_step(config: Path, residual: Path) -> None:
    out = config.parent / "traffic-other"
    words = ["traffic", "run", str(config), "global_batch_size=8", "--out", str(out), "--against", str(residual)]
    done = subprocess.run(
        [fork_server.python(), "-m", "megatron_fc", *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "megatron-fc: this run and `megatron-fc traffic run" in done.stderr
    assert "are of runs that differ in global_batch_size (8, 4): only connections may" in done.stderr
    assert not [line for line in (out / "logs" / "rank0.log").read_text().splitlines() if parse_iteration(line)]
    assert not (out / "traffic.json").exists()


class _Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.mlp = nn.Identity()


def _chunk(*numbers: int) -> nn.Module:
    chunk = nn.Module()
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList(_Layer(number) for number in numbers)
    return chunk


def test_layers_are_numbered_through_the_model() -> None:
    """A stage that holds layers 3 and 4 of a model, then one that holds 2 and 6 in chunks of their own."""
    whole = paths_in_whole_model([_chunk(3, 4)])
    assert whole("decoder.layers.1.mlp") == "decoder.layers.3.mlp"
    assert whole("decoder.final_layernorm") == "decoder.final_layernorm"
    assert whole("") == ""
    whole = paths_in_whole_model([_chunk(2), _chunk(6)])
    assert whole("0.decoder.layers.0") == "decoder.layers.1"
    assert whole("1.decoder.layers.0.mlp") == "decoder.layers.5.mlp"
    assert whole("1.output_layer") == "output_layer"
    assert whole("0") == ""

"""`megatron-fc train` as a user runs it: processes of their own, real text, checkpoints, kill -9."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.cli.main import main
from megatron_fc.megatron.stored_connections import stored_structure
from megatron_fc.mpi import free_port
from megatron_fc.resilience.run_lock import LOCK
from megatron_fc.runs.metrics import Metrics, read_metrics
from megatron_fc.runs.summary import read_summary
from support.disk import SlowDisk
from support.patience import PATIENCE, wait_for_iteration
from support.random_state import random_state
from support.token_files import write_tokens
from support.training_runs import ITERATIONS, command, environment, figures, train
from support.training_runs import config as config
from support.training_runs import finished as finished


def test_a_run_learns_and_leaves_its_figures(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary is not None
    assert summary["connection"] == "dfc_x4"
    assert summary["iterations"] == ITERATIONS
    assert summary["tokens"] == 4 * 32 * ITERATIONS
    assert summary["last_loss"] < summary["first_loss"] - 0.5
    assert summary["validation_loss"] < summary["first_loss"]
    sites, fraction = 4, 32 // 4
    assert summary["connection_parameters"] == sites * (fraction * 10 + 36 + 2)
    assert summary["versions"]["megatron-core"]
    assert summary["config"]["connections"]["rate"] == 4
    assert summary["peak_memory_bytes"] > 2**20
    scalars = read_metrics(finished).scalars
    for tag in ("lm loss", "load_balancing_loss", "z_loss", "grad-norm", "learning-rate"):
        assert list(scalars[tag]) == list(range(1, ITERATIONS + 1)), tag


def metrics_of(file: Path) -> Metrics:
    """The metrics of one event file alone."""
    alone = file.parents[2] / f"only-{file.name}"
    (alone / "tensorboard").mkdir(parents=True)
    (alone / "tensorboard" / file.name).symlink_to(file)
    return read_metrics(alone)


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["dfc", "dhc"])
def test_kill_9_and_resume_equals_the_undisturbed_run(config: Path, finished: Path, connection: str) -> None:
    run_dir, which = config.parent / f"killed_{connection}", f"connection={connection}"
    if connection != "dfc":
        finished = config.parent / "undisturbed"
        train(config, finished, which)
    words = command(config, f"run_dir={run_dir}", which)
    disk = SlowDisk(config.parent / f"seconds_{connection}")
    disk.hangs_at(20)
    variables = environment() | disk.variables
    victim = subprocess.Popen(
        words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_iteration(run_dir, 20, victim)  # which is not saved, and repeated with those before
    holder = json.loads((run_dir / LOCK).read_text())
    second = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert second.stderr.startswith(f"megatron-fc: run_dir={run_dir} belongs to process {holder['process']} on ")
    assert second.stderr.endswith(f"if it is gone, delete {run_dir / LOCK}\n")
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert latest_checkpoint(run_dir / "checkpoints") == run_dir / "checkpoints/iter_0000010"

    train(config, run_dir, which)  # which takes over the lock of the dead
    assert not (run_dir / LOCK).exists()
    first, second = (metrics_of(file) for file in sorted((run_dir / "tensorboard").iterdir()))
    assert list(first.loss) == list(range(1, 21))
    assert list(second.loss) == list(range(11, ITERATIONS + 1))
    assert figures(run_dir) == figures(finished)
    last = f"checkpoints/iter_{ITERATIONS:07d}"
    assert random_state(run_dir / last) == random_state(finished / last)


@pytest.mark.slow
def test_hybrid_and_gpt_and_every_connection_train(config: Path, finished: Path) -> None:
    gpt = read_summary(finished)
    assert gpt is not None
    short = ("train_iters=5", "lr_decay_iters=5", "save_interval=null")
    hybrid = train(config, config.parent / "hybrid", "family=hybrid", *short)
    assert hybrid["connection_parameters"] == gpt["connection_parameters"]
    assert hybrid["parameters"] == gpt["parameters"]
    residual = train(config, config.parent / "residual", "connection=residual", *short)
    assert residual["connection_parameters"] == 0
    # All weights are drawn alike, and at the start the connections are identities: the first loss is the same.
    assert residual["first_loss"] == gpt["first_loss"]
    assert "note: no CUDA device: CPU lane over gloo" in residual["printed"]
    assert "iteration 5/5" in residual["printed"]


@pytest.mark.slow
@pytest.mark.parametrize("connection", [("connection=sfc", "rate=2"), ("connection=mhc", "leave=learned")])
def test_bf16_run_resumes(config: Path, tmp_path: Path, connection: tuple[str, ...]) -> None:
    run_dir, undisturbed = tmp_path / "run", tmp_path / "straight"
    options = ("bf16=true", *connection, "lr_decay_iters=12", "save_interval=6")
    options += ("hidden_dropout=0.1", "attention_dropout=0.1")  # drawn from generators that the resume restores
    train(config, run_dir, *options, "train_iters=6")
    resumed = train(config, run_dir, *options, "train_iters=12")
    straight = train(config, undisturbed, *options, "train_iters=12")
    assert resumed["iterations"] == 12
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert figures(run_dir)[tag] == figures(undisturbed)[tag]
    assert resumed["last_loss"] == straight["last_loss"]
    last = "checkpoints/iter_0000012"
    assert random_state(run_dir / last) == random_state(undisturbed / last)


@pytest.mark.slow
def test_two_ranks_train_as_one(config: Path, finished: Path) -> None:
    """torchrun, as `make demo` uses it on several GPUs."""
    run_dir = config.parent / "two_ranks"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = command(config, f"run_dir={run_dir}", "save_interval=null", "train_iters=5")
    words[:2] = [sys.executable, "-m", *launcher]
    subprocess.run(words, env=environment(), check=True, capture_output=True)
    summary, alone = read_summary(run_dir), read_summary(finished)
    assert summary is not None
    assert alone is not None
    assert summary["world_size"] == 2
    assert summary["parameters"] == alone["parameters"]
    # The same global batch in another order of summation.
    assert summary["first_loss"] == pytest.approx(alone["first_loss"], rel=1e-5)
    assert (run_dir / "logs" / "rank0.log").exists()


def test_two_ranks_of_tensor_parallelism_hear_of_it(config: Path, tmp_path: Path) -> None:
    """Without the check both train to the end: Megatron's embedding takes such a token for another rank's."""
    prefix = write_tokens(tmp_path / "data", vocabulary=5000)
    words = [f"train_data_path=[{prefix}]", "tensor_model_parallel_size=2", "train_iters=2", "save_interval=null"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command(config, f"run_dir={tmp_path / 'run'}", *words),
            env=environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    for text in said:
        assert "and the model's vocabulary has 512: give the tokenizer that made these data, or make them again" in text


def test_checkpoint_knows_its_connections(finished: Path) -> None:
    checkpoint = latest_checkpoint(finished / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"iter_{ITERATIONS:07d}"
    assert stored_structure(checkpoint) == {
        "static_beta": 4,
        "static_gamma": 16,
        "static_alpha": 16,
        "dynamic_weight": 8,
        "scale_beta": 1,
        "scale_alpha": 1,
        "norm_weight": 8,
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rate=2"], "has dfc_x4 connections, this run has dfc_x2 connections: give the run another run_dir"),
        (["connection=sfc"], "has dfc_x4 connections, this run has sfc_x4 connections"),
        (["connection=residual"], "has dfc_x4 connections, this run has plain residual connections"),
        (["connection=dhc"], "has dfc_x4 connections, this run has dhc_x4 connections: give the run another run_dir"),
        (["connection=mhc"], "has dfc_x4 connections, this run has mhc_x4 connections"),
        (["hidden_size=64"], "has dfc_x4 connections for another width than hidden_size=64, this run has dfc_x4 conn"),
        (["connection=dhc", "cuda_graph_impl=local"], "cuda_graph_impl=local captures layers whose input is hidden"),
        (["norm=none"], "has dfc_x4 connections, this run has dfc_x4 connections without norm"),
        (["tanh=false"], "was trained with tanh=True, this run has tanh=False"),
        (
            ["num_attention_heads=3"],
            "hidden_size % num_attention_heads == 0 does not hold for hidden_size=32, num_attention_heads=3 (",
        ),
        (["sft=true"], "sft is not supported by megatron-fc train"),
        (["num_layers=3"], "num_layers: 2 in CHECKPOINT, 3 here, which makes another model: give what it was written"),
        (["num_experts=8"], "num_experts: 4 in CHECKPOINT, 8 here, which makes another model"),
        (["moe_router_topk=1", "moe_router_pre_softmax=true"], "moe_router_topk: 2 in CHECKPOINT, 1 here"),
        (["rotary_base=500000"], "rotary_base: 10000 in CHECKPOINT, 500000 here, which makes another model"),
        (["norm_epsilon=1e-6"], "layernorm_epsilon: 1e-05 in CHECKPOINT, 1e-06 here, which makes another model"),
        (["precision=bf16"], "bf16: False in CHECKPOINT, True here, which makes another state: give what it was"),
        (["optimizer.optimizer=sgd"], "optimizer: adam in CHECKPOINT, sgd here, which makes another state"),
        (["seq_length=16"], "seq_length: 32 in CHECKPOINT, 16 here, which makes other samples"),
        (
            ["tokenizer_type=NullTokenizer", "vocab_size=300"],
            "tokenizer_type: HuggingFaceTokenizer in CHECKPOINT, Null",
        ),
        (["override_ckpt_iteration=10"], "override_ckpt_iteration=10 would hold for every start"),
        (
            ["pretrained_checkpoint=x"],
            "pretrained_checkpoint=x is what load and finetune say: set load=x",
        ),
        (["optimizer.optimizer=muon", "decoupled_lr=0.01"], "optimizer=muon leaves the connections' matrices to Adam"),
    ],
)
def test_what_the_run_cannot_continue_is_refused(
    config: Path,
    finished: Path,
    overrides: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["train", str(config), f"run_dir={finished}", *overrides]) == 2
    error = capsys.readouterr().err
    assert sentence.replace("CHECKPOINT", f"{finished}/checkpoints/iter_{ITERATIONS:07d}") in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_mistake_in_a_process_of_its_own(config: Path) -> None:
    done = subprocess.run(
        command(config, "num_layer=3"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "megatron-fc: unknown key in section model: 'num_layer': did you mean 'num_layers'?\n"
    assert done.stdout == ""


@pytest.mark.parametrize("setting", ["run_dir", "save", "tensorboard_dir"])
def test_folders_that_cannot_be_written(
    config: Path, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        assert main(["train", str(config), f"run_dir={tmp_path / 'run'}", f"{setting}={folder}", "load=null"]) == 2
        assert capsys.readouterr().err == f"megatron-fc: {setting}={folder} cannot be written, {why}: choose another\n"
    readonly = Path("/proc/megatron_fc")  # which takes no folder, from root neither
    assert main(["train", str(config), f"run_dir={tmp_path / 'run'}", f"{setting}={readonly}", "load=null"]) == 2
    assert f"{setting}={readonly} cannot be written, No such file or directory" in capsys.readouterr().err


def test_cpu_lane_is_never_active_with_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fc.training import cpu_lane

    monkeypatch.setattr(cpu_lane, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    manual_seed = torch.cuda.manual_seed
    assert cpu_lane.install() is False
    assert torch.cuda.manual_seed is manual_seed

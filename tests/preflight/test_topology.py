"""`megatron-fc topology`: a cluster's view of a config, on a machine without its GPUs, packages or data."""

import json
import os
import struct
from pathlib import Path

import pytest
import yaml

from megatron_fc.cli.main import main
from megatron_fc.preflight import packages
from megatron_fc.training.machine import has_transformer_engine
from support.token_files import write_tokens

# The fixture; pytest finds it by its name here.
from support.training_runs import config as config

CONFIG = str(Path(__file__).parents[2] / "configs" / "olmoe_7b.yaml")


def ask(*words: str, nodes: int = 8) -> int:
    return main(["topology", CONFIG, *words, "--nodes", str(nodes), "--gpus-per-node", "8"])


def test_a_run_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask() == 0
    assert capsys.readouterr().out.splitlines() == [
        "ranks      64 = nodes 8 x GPUs 8",
        "layout     DP64 TP1 PP1 CP1",
        "experts    EP8 ETP1, expert-DP8",
        "batch      1,024 sequences = micro-batch 2 x DP64 x 8 accumulation steps",
        "step       4,194,304 tokens, 4,096 per sequence",
        "run        715,256 steps, 3,000,001,101,824 tokens",
        "compute    7.866e+09 FLOPs per token, forward and backward, by Megatron's count, which leaves out "
        "the connections",
        "GPU-hours  22,093 in all, 14.4 days, assuming 30% of 989 TFLOP/s per GPU in any layout: `megatron-fc plan` "
        "estimates this one, or give --tokens-per-second-per-gpu",
        "disk       checkpoints of the whole run: 716 x 96.9 GB = 69.4 TB, as all stay: keep_last=3 would delete older "
        "ones",
    ]
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


def test_a_run_over_gloo_may_do_what_gpus_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    """As the CPU lane has to: Megatron resumes no distributed optimizer there."""
    words = ["use_distributed_optimizer=false", "overlap_param_gather=false", "distributed_backend=gloo"]
    assert ask(*words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("connection", ["dhc", "mhc"])
def test_a_wider_stream_goes_into_every_layout(connection: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline_model_parallel_size=4", "num_virtual_stages_per_pipeline_rank=2"]
    assert ask(f"connection={connection}", *words) == 0, capsys.readouterr().err


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tensor_model_parallel_size=2", "make_vocab_size_divisible_by=64", "pipeline_model_parallel_size=4"]
    assert ask(*words, "num_virtual_stages_per_pipeline_rank=2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 64
    assert found["data_parallel_size"] == 8
    assert found["virtual_pipeline_model_parallel_size"] == 2
    assert found["expert_data_parallel_size"] == 2
    assert found["gradient_accumulation_steps"] == 64
    assert found["tokens_per_step"] * found["steps"] == found["tokens"] == found["target_tokens"]
    assert found["unchecked"] == []


def test_a_measured_speed_replaces_the_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("train_samples=1024000", "--tokens-per-second-per-gpu", "1000") == 0
    printed = capsys.readouterr().out
    assert "GPU-hours  1,165 in all, 0.8 days, at the given 1,000 tokens/s per GPU\n" in printed
    assert "assum" not in printed


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["keep_last=3", "keep_every=25000"], "(4 + 28) x 96.9 GB = 3.1 TB"),  # 715,256 steps, one checkpoint in 1,000
        (["keep_last=3"], "4 x 96.9 GB = 387.5 GB"),
        (["keep_last=3", "keep_every=1500"], "(4 + 237) x 96.9 GB = 23.3 TB"),  # where there is one: each 3,000
        (["save_retain_interval=50000"], "(2 + 14) x 96.9 GB = 1.5 TB"),
        (["keep_last=3", "train_samples=1024000"], "1 x 96.9 GB = 96.9 GB"),
        (["save_interval=null"], None),
    ],
)
def test_checkpoints_of_the_whole_run(words: list[str], kept: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk ")]
    assert lines == ([f"disk       checkpoints of the whole run: {kept}"] if kept else [])


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        ([], ["no Transformer Engine, so", "use_distributed_optimizer: without Transformer Engine or Apex"]),
        (["transformer_impl=local"], ["use_distributed_optimizer: without Transformer Engine or Apex"]),
        (["save_interval=null"], ["no Transformer Engine, so"]),
        (["distributed_backend=gloo"], []),
    ],
)
def test_packages_that_this_python_lacks_are_a_warning(
    words: list[str], lacks: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "has_transformer_engine", lambda: False)
    assert ask(*words, "--check-packages") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == bool(lacks)
    for said in ("no Transformer Engine, so", "use_distributed_optimizer: without Transformer Engine or Apex"):
        assert (said in "".join(warnings)) == (said in lacks)


def test_whole_batches_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("train_samples=2000") == 0
    printed = capsys.readouterr().out
    assert "1 steps, 4,194,304 tokens (the target is 8,192,000: whole batches only)" in printed
    warned = "WARNING: train_samples=2000 ends within lr_warmup_samples=2560000, so the learning rate never reaches its"
    assert printed.splitlines()[-1].startswith(warned)
    assert ask("train_samples=1000") == 2
    assert "train_samples=1000 is less than one batch, global_batch_size=1024: set more" in capsys.readouterr().err


def test_a_schedule_of_batches(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ["global_batch_size=null", "step_batch_size_schedule='0:512 2621440:1024'", "train_samples=2000"]
    assert ask(*schedule) == 0
    printed = capsys.readouterr().out
    assert "schedule   batches of 512 sequences from sample 0, 1,024 sequences from sample 640 on; shown" in printed
    # Two of 512, the second over the threshold, and one of 1,024, over the target.
    assert "run        3 steps, 8,388,608 tokens (the target is 8,192,000: whole batches only)" in printed
    assert ask("global_batch_size=null", "step_batch_size_schedule='0:500 2621440:1024'", "train_samples=2000") == 2
    assert "global_batch_size=500 does not fit 8 nodes" in capsys.readouterr().err


def test_the_clusters_packages_count_not_this_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("moe_permute_fusion=true") == 0
    assert "note:" not in capsys.readouterr().out
    assert ask("precision=fp8_delayed") == 0
    if not has_transformer_engine():
        assert (
            "note: Megatron's model config was not checked to its end, which needs Transformer Engine here: Only"
            in (capsys.readouterr().out)
        )


@pytest.mark.parametrize(
    ("words", "nodes", "sentence"),
    [
        (
            ["pipeline_model_parallel_size=2"],
            3,
            "expert_model_parallel_size=8 does not fit 3 nodes of 8 GPUs: 24 ranks are no multiple of PP2 x ETP1 x EP8 "
            "= 16; possible with TP1 PP2 EP8 ETP1: 2, 4, 8,",
        ),
        # What only GPU machines are refused has to be refused here too, but not for a run without them, see below.
        (["use_distributed_optimizer=false", "overlap_param_gather=false"], 8, "set use_distributed_optimizer"),
        (["seq_length=4100"], 8, "Megatron refuses the arguments: max_position_embeddings (4096) must be greater"),
        (["context_parallel_size=4", "seq_length=4092"], 8, "Megatron refuses the arguments: seq-length should be"),
        (
            ["moe_router_topk=1", "moe_router_pre_softmax=false"],
            8,
            "Megatron refuses the model: Please use --moe-router",
        ),
        (["global_batch_size=null"], 8, "global_batch_size is not set: set it"),
        (
            ["train_iters=1000"],
            8,
            "both set: set train_samples=1024000 for these iterations and drop train_iters, or set train_samples=null "
            "lr_decay_samples=null lr_warmup_samples=null and the learning rate's schedule in iterations",
        ),
        (
            ["train_iters=1000", "train_samples=null"],
            8,
            "count in two units: set lr_decay_samples=null lr_warmup_samples=null and lr_decay_iters and lr_warmup_ite",
        ),
        (["train_data_path=[x]", "per_split_data_args_path=y"], 8, "are both set: remove the latter, e.g. from SITE_"),
        (["train_samples=null"], 8, "the run has no end: set train_samples or train_iters"),
        (["num_layer=3"], 8, "unknown key in section model: 'num_layer': did you mean 'num_layers'?"),
        (["connection=mhc", "cuda_graph_impl=local"], 8, "hidden_size=2048 wide, and the stream of mhc_x4 has 8192"),
        (["--mfu", "0"], 8, "mfu=0.0 must be greater than 0"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], nodes: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(*words, nodes=nodes) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-fc: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_room_for_the_checkpoints_is_a_file_check(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = yaml.safe_load(config.read_text())["data"]
    words = [f"{name}={files[name]}" for name in ("train_data_path", "valid_data_path", "tokenizer_model")]
    words += [f"run_dir={tmp_path}/run", "keep_last=3"]
    huge = "moe_ffn_hidden_size=16777216"  # a checkpoint of 1.4 petabytes
    assert ask(*words, huge) == 0
    assert ask(*words, huge, "--check-files") == 2
    printed, said = capsys.readouterr()
    assert said.startswith(f"megatron-fc: {tmp_path}/run/checkpoints has ")
    assert "\nlayout     DP64 " in printed, "the rest is said all the same"
    assert " free, 4 more checkpoints need " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert ask(*words, "num_layers=1", "moe_ffn_hidden_size=8", "hidden_size=64", "--check-files") == 0


def test_damaged_data_and_foreign_tokens_are_a_file_check(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_tokens(tmp_path / "data")
    words = ["topology", str(config), f"train_data_path=[{prefix}]", "train_iters=100", "lr_decay_iters=100"]
    words += ["--nodes", "1", "--gpus-per-node", "1"]
    assert main([*words, "--check-files"]) == 0
    epochs = 100 * 4 * 32 / (Path(f"{prefix}.bin").stat().st_size / 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"WARNING: the run reads {prefix} {epochs:.2f} times over, more than 4: add data")
    assert main([*words, "train_iters=30", "lr_decay_iters=30", "--check-files"]) == 0
    assert f"data       the run reads {prefix} {epochs * 0.3:.2f} times over\n" in capsys.readouterr().out
    write_tokens(prefix, vocabulary=5000)
    assert main([*words, "--check-files"]) == 2
    assert ", and the model's vocabulary has 384: give the tokenizer that made these data" in capsys.readouterr().err
    write_tokens(prefix)
    with open(f"{prefix}.idx", "r+b") as index:
        index.seek(34 + 12 * 40 + 8 * 5)  # the end of a document in the middle
        index.write(struct.pack("<q", 10**9))
    assert main([*words, "--check-files"]) == 2
    assert "do not follow each other: copy both files again" in capsys.readouterr().err
    assert main(words) == 0, "no files are asked for"
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == [], "a look leaves nothing"

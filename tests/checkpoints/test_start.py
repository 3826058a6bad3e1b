"""What a run does when it is told to end, and when its newest checkpoint turns out to be damaged."""

import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
from argparse import Namespace
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc import FracConfig, UserError
from megatron_fc.checkpoints.changes import changes, refuse_other_model, stored_args
from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.checkpoints.start import Start, StartOptions, choose_start
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.runs.status import read_run
from support.damage import SHARD, cut, flip
from support.patience import PATIENCE, wait_for_iteration
from support.training_runs import command, environment, figures, train
from support.training_runs import config as config

ENDLESS = ("train_iters=100000", "lr_decay_iters=100", "save_interval=4", "eval_iters=0")
SHORT = ("train_iters=12", *ENDLESS[1:])


ARCHIVE = Path(__file__).parent / "data" / "before_the_rooms.tar.xz"  # one checkpoint, of iteration 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "saved", filter="data")
    return tmp_path / "saved"


def chosen(
    told: list[str], frac: FracConfig | None = None, run_dir: Path = Path("run"), **given: Any
) -> tuple[Start, Namespace]:
    """What is chosen, and the arguments that it was chosen from, which stay as they are."""
    args = {"load": None, "save": None, "ckpt_step": None, "finetune": False, "no_load_optim": None}
    args |= {"no_load_rng": None, "train_samples": None, "step_batch_size_schedule": None, "seq_length": 32}
    args |= {"from_residual": False, "hidden_size": 8, "global_batch_size": 4, **given}
    options = StartOptions(run_dir, frac or FracConfig(rate=2), "refuse", told.append)
    namespace = Namespace(**args)
    start = choose_start(namespace, options)
    assert vars(namespace) == args
    return start, namespace


def test_a_start_is_chosen_without_touching_the_arguments(saved: Path, tmp_path: Path) -> None:
    told: list[str] = []
    checkpoint, elsewhere = saved / "iter_0000003", str(tmp_path / "elsewhere")
    newest = Start(saved, checkpoint, iteration=3, consumed_samples=12)
    assert chosen(told)[0] == Start()
    assert chosen(told, load=str(saved))[0] == newest
    assert chosen(told, load=str(saved), ckpt_step=3)[0] == replace(newest, step=3, is_pinned=True, given_step=3)
    anew = chosen(told, load=str(saved), save=elsewhere, finetune=True)[0]
    assert anew == replace(newest, step=None, iteration=0, consumed_samples=0, anew=True)
    assert told == []
    assert chosen(told, load=elsewhere, save=str(saved), ckpt_step=99)[0] == replace(newest, given_step=99)
    assert chosen(told, load=str(saved), save=str(saved), finetune=True)[0] == newest
    assert [line.partition(";")[0] for line in told] == [
        f"note: this run goes on from {saved}",
        f"note: this run goes on from {checkpoint}",
    ]
    with pytest.raises(UserError, match="holds no checkpoint: give the folder with"):
        chosen(told, load=elsewhere)
    with pytest.raises(UserError, match="has dfc_x2 connections, this run has dfc_x4 connections"):
        chosen(told, load=str(saved), frac=FracConfig(rate=4))


def test_megatrons_arguments_hear_of_a_start_in_one_place(saved: Path) -> None:
    start, args = chosen([], load=str(saved), ckpt_step=3, save="own", finetune=True)
    with pytest.raises(FrozenInstanceError):
        start.step = 4  # type: ignore[misc]
    replace(start, folder=Path("other"), step=7, anew=False).apply(args)
    assert (args.load, args.ckpt_step, args.finetune, args.save) == ("other", 7, False, "own")


def test_what_says_how_a_run_begins_is_not_applied_to_its_own_checkpoints(saved: Path, tmp_path: Path) -> None:
    told: list[str] = []
    given = {"finetune": False, "no_load_optim": True, "no_load_rng": True}
    begins, _ = chosen(told, load=str(saved), save=str(tmp_path / "elsewhere"), **given)
    assert (begins.fresh_optimizer, begins.fresh_random) == (True, True)
    left = "is left: its state is new, and the learning rate warms up again"
    assert told == [f"note: the optimizer of {saved / 'iter_0000003'} {left}"]
    for load in (saved, tmp_path / "elsewhere"):
        told.clear()
        goes_on, args = chosen(told, load=str(load), save=str(saved), **given)
        assert (goes_on.fresh_optimizer, goes_on.fresh_random) == (False, False)
        assert told[-1].endswith("; no_load_optim=true and no_load_rng=true was for its beginning")
        goes_on.apply(args)
        assert (args.no_load_optim, args.no_load_rng) == (False, False)


def test_ckpt_step_is_applied_once(saved: Path, tmp_path: Path) -> None:
    """A requeued job would go back to it at every start."""
    told: list[str] = []
    given = {"load": str(saved), "save": str(saved), "run_dir": tmp_path}
    assert chosen(told, ckpt_step=3, **given)[0].is_pinned
    for step in (None, 2, 3):
        line = {"event": "start", "ckpt_step": step}
        with open(tmp_path / "starts.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n" + json.dumps({"event": "end"}) + "\n")
        start = chosen(told, ckpt_step=3, **given)[0]
        assert (start.step, start.is_pinned, start.given_step) == ((3, True, 3) if step != 3 else (None, False, 3))
    assert told == [
        f"note: ckpt_step=3 was applied at an earlier start; to go back once more, write 3 into {saved / TRACKER}"
    ]


def test_what_differs_from_the_checkpoint_is_refused_or_announced(saved: Path) -> None:
    told: list[str] = []
    checkpoint = saved / "iter_0000003"
    start, _ = chosen(told, load=str(saved), lr=0.5, seed=7, num_workers=3, log_interval=77)
    assert set(start.changed) == {"lr", "seed"}
    assert [line.partition(": ")[2] for line in told] == [
        f"changed since iter_0000003: lr {start.changed['lr'][0]} -> 0.5, seed {start.changed['seed'][0]} -> 7",
        "with seed the order of the data changes: what this run has read may come again",
    ]
    for given, sentence in {
        ("num_layers", 5): f"num_layers: 1 in {checkpoint}, 5 here, which makes another model: give what it was",
        ("rotary_base", 500): f"rotary_base: 10000 in {checkpoint}, 500 here, which makes another model",
        ("expert_model_parallel_size", 2): f"expert_model_parallel_size: 1 in {checkpoint}, 2 here",
    }.items():
        with pytest.raises(UserError, match=f"^{sentence}"):
            chosen(told, load=str(saved), **dict([given]))
        anew = chosen(told, load=str(saved), save="elsewhere", finetune=True, **dict([given]))[0]
        assert anew.changed == {}
    other = Namespace(**vars(stored_args(checkpoint)) | {"num_layers": 5, "rotary_base": 500})
    with pytest.raises(UserError, match="5 here, which makes another model, as does rotary_base: give what it was wri"):
        refuse_other_model(checkpoint, other)
    chosen(told, load=str(saved), expert_model_parallel_size=2, no_load_optim=True)
    chosen(told, load=str(saved), global_batch_size=8)
    with pytest.raises(
        UserError, match=r"set global_batch_size=null step_batch_size_schedule='0:4 384:8', which says f"
    ):
        chosen(told, load=str(saved), global_batch_size=8, train_samples=100)
    by_schedule = {"global_batch_size": 2, "train_samples": 100, "step_batch_size_schedule": "0:4 384:8"}
    assert set(chosen(told, load=str(saved), **by_schedule)[0].changed) == {"train_samples", "step_batch_size_schedule"}


def test_what_nobody_has_thought_of_is_announced() -> None:
    args = Namespace(consumed_train_samples=0, lr=1.0, load="a", something_new=1, only_before=1)
    now = Namespace(consumed_train_samples=8, lr=1.0, load="b", something_new=2, only_now=1)
    assert changes(args, now) == {"something_new": (1, 2)}
    assert changes(None, now) == {}


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_its_processes_lets_a_run_save_and_end(config: Path, number: signal.Signals) -> None:
    """As SLURM sends it, where a task is all that it has started: Megatron's checkpoint writers among them."""
    run_dir = config.parent / f"told-{number.name}"
    process = subprocess.Popen(
        command(config, f"run_dir={run_dir}", *ENDLESS),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_iteration(run_dir, 6, process)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    name = number.name.removeprefix("SIG")
    assert printed.endswith(f"dfc_x4  ended early: signal {name}\n")
    start, end = events(run_dir)
    assert (start["event"], start["iteration"], start["checkpoint"], start["world_size"]) == ("start", 0, None, 1)
    assert (end["event"], end["reason"], end["iteration"] >= 6) == ("end", f"signal {name}", True)
    assert end["consumed_samples"] == 4 * end["iteration"]
    assert (run_dir / "checkpoints" / TRACKER).read_text() == str(end["iteration"])
    assert (run_dir / "state").read_text() == "continue\n"


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run with checkpoints after 4, 8 and 12 iterations."""
    run_dir = config.parent / "three_checkpoints"
    train(config, run_dir, *SHORT)
    return run_dir


def test_a_run_notes_its_start_and_its_end(finished: Path) -> None:
    start, end = events(finished)
    assert (start["event"], start["consumed_samples"], start["target_samples"]) == ("start", 0, 48)
    assert (end["event"], end["reason"], end["iteration"], end["consumed_samples"]) == ("end", "target", 12, 48)
    assert (finished / "state").read_text() == "done\n"


DAMAGES = {
    "files": lambda folder: cut(folder / "iter_0000012" / SHARD),
    "content": lambda folder: flip(folder / "iter_0000012" / SHARD, 50_000),
    "content, and files of the one before": lambda folder: (
        flip(folder / "iter_0000012" / SHARD, 50_000),
        cut(folder / "iter_0000008" / SHARD),
    ),
    "tracker": lambda folder: (folder / TRACKER).write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_loudly(damage: str, config: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = run_dir / "checkpoints"
    DAMAGES[damage](folder)
    goes_on = {"tracker": 12, "content, and files of the one before": 4}.get(damage, 8)
    printed = train(config, run_dir, *SHORT, "on_damage=previous")["printed"]
    assert "WARNING: " in printed
    assert f"on_damage=previous: this run does, and what came after iter_{goes_on:07d} is trained again" in printed
    start, end = events(run_dir)[2:]
    assert start["checkpoint"] == str(folder / f"iter_{goes_on:07d}")
    assert (start["iteration"], start["consumed_samples"]) == (goes_on, goes_on * 4)
    assert end["reason"] == "target"
    assert (folder / TRACKER).read_text() == "12"
    assert figures(run_dir) == figures(finished)


def test_a_run_goes_on_with_other_rates_and_another_batch(config: Path, finished: Path, tmp_path: Path) -> None:
    """From an earlier checkpoint of its own; the same command then goes on from the newest."""
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    changed = ("ckpt_step=8", "lr=3e-3", "min_lr=2e-3", "adam_beta2=0.9", "lr_decay_iters=10", "global_batch_size=8")
    printed = train(config, run_dir, *SHORT, *changed, "train_iters=10", "save_interval=2")["printed"]
    assert (
        "note: changed since iter_0000008: adam_beta2 0.95 -> 0.9, global_batch_size 4 -> 8, lr 0.001 -> 0.003, "
        "lr_decay_iters 100 -> 10, min_lr 0.0001 -> 0.002, train_iters 12 -> 10\n"
        "note: with global_batch_size and train_iters the order of data that are read more than once may change\n"
    ) in printed
    start, end = events(run_dir)[2:]
    assert (start["iteration"], start["ckpt_step"], start["changed"]["lr"]) == (8, 8, [0.001, 0.003])
    samples = 8 * 4 + 2 * 8
    assert (end["consumed_samples"], end["target_samples"]) == (samples, samples)
    rates = read_metrics(run_dir).scalars["learning-rate"]
    # The schedule goes by samples: 4 steps of 8 warm up, and 10 are its end.
    cosine = [0.002 + 0.001 * 0.5 * (1 + math.cos(math.pi * (seen - 32) / 48)) for seen in (40, 48)]
    assert [rates[9], rates[10]] == pytest.approx(cosine, rel=1e-6)
    [group, *_] = param_groups(run_dir / "checkpoints/iter_0000010")
    assert (group["betas"], group["max_lr"], group["min_lr"]) == ((0.9, 0.9), 0.003, 0.002)

    run = read_run(run_dir)
    assert (run.tokens, run.target_tokens, run.state) == (samples * 32, samples * 32, "done")
    summary = train(config, run_dir, *SHORT, *changed, "train_iters=11", "save_interval=100")
    assert "note: ckpt_step=8 was applied at an earlier start" in summary["printed"]
    assert events(run_dir)[4]["iteration"] == 10
    assert summary["tokens"] == (samples + 8) * 32


def param_groups(checkpoint: Path) -> list[dict[str, Any]]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]["param_groups"]


@pytest.mark.parametrize("changed", ["tokenizer", "padding"])
def test_a_run_keeps_its_vocabulary(changed: str, config: Path, finished: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text())
    given, sentence = "make_vocab_size_divisible_by=64", "padded_vocab_size: 384 in "
    if changed == "tokenizer":
        folder = Path(shutil.copytree(content["data"]["tokenizer_model"], tmp_path / "tokenizer"))
        vocabulary = json.loads((folder / "tokenizer.json").read_text())
        tokens = vocabulary["model"]["vocab"]
        tokens["e"], tokens["t"] = tokens["t"], tokens["e"]
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        given, sentence = f"tokenizer_model={folder}", f"tokenizer_model={folder} makes other tokens of a text than"
    done = subprocess.run(
        command(config, f"run_dir={finished}", *SHORT, "train_iters=13", given),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"megatron-fc: {sentence}")


@pytest.mark.slow
def test_an_interrupt_says_what_is_kept(config: Path) -> None:
    run_dir = config.parent / "interrupted"
    process = subprocess.Popen(
        command(config, f"run_dir={run_dir}", *ENDLESS),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the tests run behind an &
    )
    wait_for_iteration(run_dir, 6, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    saved = (run_dir / "checkpoints" / TRACKER).read_text()
    assert process.returncode == 130
    assert said == (
        f"megatron-fc: interrupted: start the same command again, it goes on from "
        f"{run_dir}/checkpoints/iter_{int(saved):07d}\n"
    )
    assert events(run_dir)[-1]["reason"] == "interrupted"
    assert not (run_dir / "lock").exists()


def test_the_same_command_goes_on_from_the_runs_own_checkpoints(config: Path, finished: Path) -> None:
    """`load`, `ckpt_step`, `finetune` and `no_load_optim` say how it began, and are not applied again."""
    run_dir = config.parent / "fine-tuned"
    began = (f"load={finished / 'checkpoints'}", "ckpt_step=8", "finetune=true", "no_load_optim=true")
    began += ENDLESS[1:]
    assert "goes on from" not in train(config, run_dir, *began, "train_iters=4")["printed"]
    printed = train(config, run_dir, *began, "train_iters=8")["printed"]
    own = run_dir / "checkpoints"
    assert f"note: this run goes on from {own}; load={finished / 'checkpoints'} was where it began\n" in printed
    assert f"note: this run goes on from {own}/iter_0000004; finetune=true and no_load_optim=true was for" in printed
    starts = [event for event in events(run_dir) if event["event"] == "start"]
    came_from = [str(finished / "checkpoints/iter_0000008"), str(own / "iter_0000004")]
    assert [start["checkpoint"] for start in starts] == came_from
    assert [(start["iteration"], start["consumed_samples"]) for start in starts] == [(0, 0), (4, 16)]
    losses = read_metrics(run_dir).loss
    assert list(losses) == list(range(1, 9))
    assert losses[5] < losses[1]

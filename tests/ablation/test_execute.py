"""A suite on tiny models: killed and gone on with, recorded, compared; the same start for what variants share."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc.ablation.execute import diverged, left
from megatron_fc.ablation.planned import Planned
from megatron_fc.ablation.suite import read_suite
from megatron_fc.cli.main import main
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.runs.summary import read_summary
from support import fork_server
from support.disk import SlowDisk
from support.patience import wait_for_iteration
from support.training_runs import config as config
from support.training_runs import environment

VARIANTS: dict[str, Any] = {
    "residual": {"connection": "residual", "copies": 1},
    "dfc_x4": {"connection": "dfc", "rate": 4, "save_interval": 7},
}
SEEDS = [11, 12]


@pytest.fixture
def suite(config: Path) -> Path:
    content = {"config": config.name, "seeds": SEEDS, "baseline": "residual", "variants": VARIANTS}
    content["overrides"] = {"train_iters": 15, "save_interval": 10, "log_residual_gain": True}
    content["keep_checkpoints_of"] = [11]
    file = config.parent / "suite.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def command(suite: Path, *words: object) -> list[str]:
    folders = ["--out", suite.parent / "runs", "--results", suite.parent / "results"]
    return [fork_server.python(), "-m", "megatron_fc", "ablate", *map(str, [suite, *folders, *words])]


def ablate(suite: Path, *words: object, code: int = 0) -> str:
    done = subprocess.run(command(suite, *words), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def starts(run_dir: Path) -> list[int]:
    """The iteration that each start went on from."""
    events = map(json.loads, (run_dir / "starts.jsonl").read_text().splitlines())
    return [event["iteration"] for event in events if event["event"] == "start"]


@pytest.mark.slow
def test_a_killed_suite_goes_on_and_runs_nothing_twice(suite: Path) -> None:
    runs, results = suite.parent / "runs", suite.parent / "results"
    disk = SlowDisk(suite.parent / "seconds")
    disk.hangs_at(14)  # only the second run saves there
    victim = subprocess.Popen(
        command(suite), env=environment() | disk.variables, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_iteration(runs / "dfc_x4-seed11", 14, victim)
    first = (results / "residual-seed11.json").read_bytes()
    os.kill(fork_server.process_id(victim), signal.SIGKILL)
    victim.wait()
    disk.is_well()

    printed = ablate(suite)
    assert "residual-seed11 begins" not in printed
    assert "dfc_x4-seed11 begins, 1 of 5 are done" in printed
    assert (results / "residual-seed11.json").read_bytes() == first
    assert starts(runs / "residual-seed11") == [0]
    assert starts(runs / "dfc_x4-seed11") == [0, 7]
    names = [f"{variant}-seed{seed}" for seed in SEEDS for variant in VARIANTS] + ["residual-seed11-copy1"]
    assert {path.stem for path in results.glob("*seed*.json")} == set(names)
    records = {name: json.loads((results / f"{name}.json").read_text()) for name in names}
    for name, record in records.items():
        summary = read_summary(runs / name)
        assert summary is not None
        assert record["validation_loss"] == summary["validation_loss"]
        assert summary["iterations"] == 15
        assert (runs / name / "checkpoints").exists() == (record["seed"] == 11)
    # Within a seed the same data and weights: at the start the connections are identities.
    losses = {name: record["first_loss"] for name, record in records.items()}
    assert losses["residual-seed11"] == losses["dfc_x4-seed11"] != losses["dfc_x4-seed12"] == losses["residual-seed12"]
    # A copy of h and one of o per sub-layer more than plain residuals: two rows of 32 values per layer and some.
    assert records["residual-seed11"]["saved_bytes"] == 0
    assert 2 * 32 * 4 <= records["dfc_x4-seed11"]["saved_bytes"] < 3 * 32 * 4
    # A copy is the same run but for its rounding.
    apart = abs(losses["residual-seed11"] - losses["residual-seed11-copy1"])
    assert apart < 1e-5
    curves = [read_metrics(runs / name).loss for name in ("residual-seed11", "residual-seed11-copy1")]
    assert curves[0] != curves[1]
    assert records["residual-seed11-copy1"]["validation_loss"] == pytest.approx(
        records["residual-seed11"]["validation_loss"], abs=0.05
    )
    # The whole validation set was run, and the gain of the residual path has grown from that of the identity.
    assert summary["config"]["optimizer"]["eval_iters"] == whole(suite)
    gains = read_metrics(runs / "dfc_x4-seed12").scalars["residual-gain"]
    assert list(gains) == list(range(1, 16))
    assert 1 < records["dfc_x4-seed12"]["last_residual_gain"] == gains[15] < 2
    assert records["residual-seed12"]["last_residual_gain"] is None

    # On another machine, which has the records alone.
    again = ablate(suite, "--out", suite.parent / "elsewhere")
    assert "begins" not in again
    assert not (suite.parent / "elsewhere").exists()
    table = (results / "summary.md").read_text()
    assert table in again
    difference = sum(
        records[f"dfc_x4-seed{seed}"]["validation_loss"] - records[f"residual-seed{seed}"]["validation_loss"]
        for seed in SEEDS
    )
    assert f"{difference / 2:+.4f} ±" in table

    # Other settings are not taken for these.
    said = "residual-seed11.json is of a run with other settings in the config or on the command line: give another"
    assert said in ablate(suite, "lr=0.1", code=2)

    # What is damaged, or nobody could write, is said before anything trains.
    record = results / "residual-seed11.json"
    record.write_text(json.dumps({name: records["residual-seed11"][name] for name in ("digest", "data")}))
    assert "residual-seed11.json is no record of a run: delete it" in ablate(suite, code=2)
    record.unlink()
    summary_file = runs / "residual-seed11" / "summary.json"
    summary_file.write_text(summary_file.read_text()[:100])
    assert "summary.json is damaged: delete it and start the run again" in ablate(suite, "--table", code=2)
    assert "tiny.yaml cannot be written, File exists" in ablate(suite, "--results", suite.parent / "tiny.yaml", code=2)
    # A variant without its baseline is a run, and no table yet.
    alone = ablate(suite, "--variants", "dfc_x4", "--seeds", 12, "--out", runs, "--results", suite.parent / "alone")
    assert "no table yet: the baseline residual of dfc_x4 has no finished run: run it" in alone


def whole(suite: Path) -> int:
    """Batches of the validation set."""
    sections = yaml.safe_load((suite.parent / "tiny.yaml").read_text())
    [prefix] = sections["data"]["valid_data_path"]
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    return int((tokens - 1) // 32 // 4)


def test_a_run_that_diverges_has_a_record(suite: Path) -> None:
    folders = ["--results", suite.parent / "diverged", "--out", suite.parent / "diverging"]
    words = [*folders, "lr=1e30", "lr_warmup_iters=0", "--variants", "residual", "--seeds", 11]
    assert "residual-seed11 diverged after iteration" in ablate(suite, *words)
    file = suite.parent / "diverged" / "residual-seed11.json"
    record = json.loads(file.read_text())
    assert record["diverged"]
    assert record["validation_loss"] is None
    assert record["iterations"] < 15
    again = ablate(suite, *words)
    assert "begins" not in again
    assert "| residual |  | 0, 1 diverged, 1 not there |" in again
    # On SLURM the scripts give such a run up, and the table takes it in.
    file.unlink()
    (suite.parent / "diverging" / "residual-seed11" / "state").write_text("stuck\n")
    assert "| residual |  | 0, 1 diverged, 1 not there |" in ablate(suite, *words, "--table")
    same = json.loads(file.read_text())
    assert {**same, "seconds": None} == {**record, "seconds": None}


END = {"event": "end", "reason": "exit"}


def given_up(run_dir: Path, *events: dict[str, Any]) -> Path:
    """A run that the launch scripts call stuck, without what it logged."""
    run_dir.mkdir(parents=True)
    (run_dir / "starts.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    (run_dir / "state").write_text("stuck\n")
    return run_dir


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        ([{"event": "start"}, END | {"exit_code": 17}], True),
        ([{"event": "start"}, END | {"exit_code": 16}], True),
        ([{"event": "start"}, END | {"exit_code": None}], False),
        ([END | {"exit_code": 17}, {"event": "start"}], False),
        ([END | {"exit_code": 17}, {"event": "start"}, END | {"exit_code": 2}], False),
        ([], False),
    ],
)
def test_a_run_is_stuck_for_other_reasons_too(
    suite: Path, tmp_path: Path, events: list[dict[str, Any]], counts: bool
) -> None:
    """Such a run, whose input was wrong or whose node was lost, is left and has no record."""
    read, results = read_suite(suite), tmp_path / "results"
    one = Planned(read.runs[0], [], given_up(tmp_path / "run", *events), "digest", "data")
    assert left(read, [one], results, record=not counts) == ([] if counts else [one])
    assert diverged([one], results) == ([one.run.name] if counts else [])
    assert not results.exists()
    (one.run_dir / "state").write_text("continue\n")
    assert left(read, [one], results) == [one], "it goes on"


def test_a_dry_run_writes_nothing(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A submission records what has diverged, says so, and how it is tried again."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    run_dir = given_up(runs / "residual-seed11", END | {"exit_code": 17})
    (run_dir / "launches").write_text("0\n")
    said = "1 run counts as diverged: residual-seed11; to try one again, delete"
    said += f" {results}/NAME.json and, in {runs}/NAME, state and launches\n"

    def ask(*words: str) -> tuple[str, str]:
        assert main(["ablate", str(suite), "--out", str(runs), "--results", str(results), *words]) == 0
        return capsys.readouterr()

    def files() -> set[Path]:
        return set(tmp_path.rglob("*"))

    before = files()
    assert "residual-seed11  begun  " in ask("--dry-run")[0]
    assert files() == before
    words = str(tmp_path / "words")
    assert ask("--dry-run", "--left", words) == ("1,2,3,4\n", said)
    assert {path for path in files() - before if path.parent.name != "words"} == {tmp_path / "words"}
    assert ask("--left", words) == ask("--left", words) == ("1,2,3,4\n", said)
    assert json.loads((results / "residual-seed11.json").read_text())["diverged"]

    for file in (results / "residual-seed11.json", run_dir / "state", run_dir / "launches"):
        file.unlink()
    assert ask("--left", words) == ("0,1,2,3,4\n", "")


@pytest.mark.slow
def test_runs_that_fail_are_named(suite: Path) -> None:
    words = ["hidden_dropout=2.0", "--variants", "residual", "--seeds", 11]
    printed = ablate(suite, *words, "--results", suite.parent / "other", "--out", suite.parent / "failing", code=1)
    assert "residual-seed11 failed with code" in printed

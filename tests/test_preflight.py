"""`megatron-fc preflight` on real ranks, and what it says of ranks and nodes that are not as they should be."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from test_pretrain import config as config

from megatron_fc import preflight
from megatron_fc.errors import UserError
from megatron_fc.preflight import NodeError, Plan


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(config: Path, run_dir: Path, *overrides: str) -> list[tuple[int, str]]:
    """Exit code and output of each of two ranks."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = [sys.executable, "-m", "megatron_fc", "preflight", str(config), f"run_dir={run_dir}", *overrides]
    ranks = [
        subprocess.Popen(
            words,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    told = ["".join(line + "\n" for line in text.splitlines() if "socket.cpp" not in line) for text in printed]
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


def test_all_is_well(config: Path, tmp_path: Path) -> None:
    (code, said), second = run(config, tmp_path / "run", "distributed_backend=gloo")
    assert code == 0
    assert said.startswith("preflight: 2 ranks on 1 node; no devices needed; clocks within 0.")
    assert "; all-reduce of 16 MiB over gloo right, " in said
    assert second == (0, "")
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("overrides", "code", "sentence"),
    [
        ([], 75, f"preflight: {socket.gethostname()} has 0 CUDA devices for 2 ranks: drain it"),
        (["train_data_path=[/no/data]"], 2, "train_data_path=/no/data: /no/data.bin does not exist"),
        (["pipeline_model_parallel_size=3"], 2, "Megatron refuses the arguments: "),
        (
            ["run_dir=/dev/null/x", "distributed_backend=gloo"],
            2,
            "run_dir=/dev/null/x cannot be written, Not a directory",
        ),
    ],
)
def test_what_is_wrong_is_said_once(
    config: Path, tmp_path: Path, overrides: list[str], code: int, sentence: str
) -> None:
    first, second = run(config, tmp_path / "run", *overrides)
    assert first[0] == code
    assert sentence in first[1]
    assert first[1].count("\n") == 1
    assert second == (code, "")


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "MEETING", timedelta(seconds=1))
    with pytest.raises(NodeError, match=r"^rank 1 did not come within 1 s, 7 of 8 are missing"):
        preflight.preflight(lambda: pytest.fail("no plan is made"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(NodeError, match=r"^rank 1 on \S+ does not reach the first rank at 127.0.0.1:"):
        preflight.preflight(lambda: pytest.fail("no plan is made"))


def test_clocks_and_room(tmp_path: Path) -> None:
    seen = [preflight._Seen("n0", 8, 1000.0, None), preflight._Seen("n1", 8, 1007.5, None)]
    with pytest.raises(NodeError, match=r"^the clocks of n0 and n1 are 7.5 s apart: set them by NTP"):
        preflight._clocks(seen)
    plan = Plan(tmp_path, {}, on_devices=True, checkpoint_bytes=1 << 50, checkpoints=4)
    with pytest.raises(
        UserError, match=r" free, 4 checkpoints need 4,194,304.0 GiB: make room or choose another run_dir"
    ):
        preflight._room(plan)


def test_alone_it_says_how_to_start_it(config: Path) -> None:
    words = [sys.executable, "-m", "megatron_fc", "preflight", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "megatron-fc: preflight is for all ranks of a job: start it with srun, mpirun or torchrun, as launch/ does\n"
    )

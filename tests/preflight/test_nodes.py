"""`megatron-fc preflight` on real ranks, and what it says of ranks and nodes that are not as they should be."""

import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.errors import NodeError, UserError
from megatron_fc.mpi import free_port
from megatron_fc.preflight import nodes, rendezvous
from megatron_fc.preflight.nodes import DiskSpace, Requirements
from support import fork_server
from support.patience import PATIENCE
from support.training_runs import config as config


def run(config: Path, run_dir: Path, *overrides: str) -> list[tuple[int, str]]:
    """Exit code and output of each of two ranks."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [fork_server.python(), "-m", "megatron_fc", "preflight", str(config), f"run_dir={run_dir}", *overrides]
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
    printed = [rank.communicate(PATIENCE)[0] for rank in ranks]
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
        (
            ["data_cache_path=/dev/null/x", "distributed_backend=gloo"],
            2,
            ": indexes of the data cannot be written to /dev/null/x, File exists: correct data_cache_path=/dev/null/x",
        ),
        (["clip_grad=1", "hidden_size=33"], 2, "hidden_size"),
        (
            ["expert_model_parallel_size=4"],
            2,
            "expert_model_parallel_size=4 does not fit 1 node of 2 GPUs: 2 ranks are no multiple of PP1 x ETP1 x EP4",
        ),
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
    ranks = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nodes, "RENDEZVOUS", timedelta(seconds=1))
    monkeypatch.setattr(rendezvous, "GRACE", timedelta(seconds=0))
    with pytest.raises(NodeError, match=r"^rank 1 did not come within 1 s, 7 of 8 are missing"):
        nodes.preflight(lambda: pytest.fail("no plan is made"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(NodeError, match=r"^rank 1 on \S+ does not reach the first rank at 127.0.0.1:"):
        nodes.preflight(lambda: pytest.fail("no plan is made"))


def two_ranks(
    asked: int, read_requirements: Callable[[], Requirements], on_second: dict[str, Callable[..., Any]]
) -> str:
    """What one of two ranks says that do a part of the pre-flight in their own way."""

    def check(rank: int) -> None:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(world | {"RANK": str(rank)})
        nodes.RENDEZVOUS = nodes.CHECK = timedelta(seconds=3)
        rendezvous.GRACE = timedelta(seconds=1)
        vars(nodes).update(on_second if rank else {})
        try:
            nodes.preflight(read_requirements)
        except NodeError as error:
            says[rank].send(str(error))
        finally:
            os._exit(0)

    port, fork = str(free_port()), multiprocessing.get_context("fork")
    hears, says = zip(*(fork.Pipe(duplex=False) for _ in range(2)), strict=True)
    ranks = [fork.Process(target=check, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    said = hears[asked].recv() if hears[asked].poll(PATIENCE) else ""
    for process in ranks:
        process.kill()
        process.join()
    return str(said)


def wait_for_ever(*_: Any) -> Any:
    time.sleep(3600)


HOST = socket.gethostname()


@pytest.mark.slow
def test_a_first_rank_that_makes_no_plan_is_named() -> None:
    assert two_ranks(1, wait_for_ever, {}).startswith(f"rank 1 on {HOST} hears nothing of the first rank at 127.0.0.1:")


def test_a_node_whose_files_never_answer_is_named(tmp_path: Path) -> None:
    plan = Requirements({}, {}, {}, on_devices=False, disk_space=None)
    said = two_ranks(0, lambda: plan, {"_look": wait_for_ever})
    assert said == f"rank 1 on {HOST} did not look at its files within 3 s, 1 of 2 are missing"


def test_a_rank_that_is_lost_in_the_network_is_a_sentence(tmp_path: Path) -> None:
    plan = Requirements({}, {}, {}, on_devices=False, disk_space=None)
    said = two_ranks(0, lambda: plan, {"_add_up": lambda *_: os._exit(1)})
    assert said.startswith(f"all-reduce failed on {HOST}: ")


@pytest.mark.parametrize(
    ("devices", "error", "sentence"),
    [
        (1, NodeError, "n1 has 1 CUDA devices for 2 ranks: drain it"),
        (8, UserError, "n1 has 8 CUDA devices for 2 ranks, and some would be idle: start one rank for each, or hide"),
    ],
)
def test_every_device_has_a_rank(devices: int, error: type[Exception], sentence: str, tmp_path: Path) -> None:
    needs = Requirements(tmp_path, {}, {}, on_devices=True, disk_space=None)
    seen = [nodes._Seen(host, count, 0.0, None) for host, count in [("n0", 2), ("n1", devices)] for _ in range(2)]
    with pytest.raises(error, match=f"^{sentence}"):
        nodes._devices(seen, needs)
    assert nodes._devices(seen[:2], needs) == "2 CUDA devices each"


def test_clocks() -> None:
    seen = [nodes._Seen("n0", 8, 1000.0, None), nodes._Seen("n1", 8, 1007.5, None)]
    with pytest.raises(NodeError, match=r"^the clocks of n0 and n1 are 7.5 s apart: set them by NTP"):
        nodes._clocks(seen)


def test_room(tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"  # not there yet
    with pytest.raises(
        UserError, match=r"checkpoints has \S+ .iB free, 4 more checkpoints need 4,194,304.0 GiB: make room or choose"
    ):
        DiskSpace(folder, 1 << 50, 4, (4, 0)).check()
    assert DiskSpace(folder, 1 << 10, 1, (4, 28)).check().endswith(" free, 1 more checkpoint needs 1.0 KiB")
    assert DiskSpace(folder, None, 4, (4, 0)).check().endswith(" free, what a checkpoint needs is not known")
    assert not folder.parent.exists()


def test_alone_it_says_how_to_start_it(config: Path) -> None:
    words = [fork_server.python(), "-m", "megatron_fc", "preflight", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "megatron-fc: preflight is for all ranks of a job: start it with srun, mpirun or torchrun, as launch/ does\n"
    )

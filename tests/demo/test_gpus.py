"""How the demo spreads over the GPUs of a machine; no process is started."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fc.demo import run
from support.token_files import write_tokens


def test_as_many_gpus_as_divide_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert not check
        commands.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=start))
    write_tokens(tmp_path / "text")
    (tmp_path / "tokenizer.json").touch()
    overrides = [f"{part}_data_path=['{tmp_path / 'text'}']" for part in ("train", "valid")]
    overrides += [f"tokenizer_model={tmp_path / 'tokenizer.json'}", f"run_dir={tmp_path / 'run'}"]
    overrides += ["global_batch_size=12", "micro_batch_size=12"]
    for gpus, ranks in ((0, 1), (1, 1), (2, 2), (5, 4), (8, 6)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert run._train("dfc_x4", overrides) == 7
        command = commands.pop()
        launcher = [word for word in command if word.startswith("--nproc-per-node")]
        assert launcher == ([f"--nproc-per-node={ranks}"] if ranks > 1 else [])
        # The last of two settings counts: every rank takes its part of the batch at once.
        assert command[-1] == (f"micro_batch_size={12 // ranks}" if ranks > 1 else "micro_batch_size=12")

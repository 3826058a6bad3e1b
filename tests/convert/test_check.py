"""Logits over the fence: a run of two ranks against its export, and against an export that was damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fc.convert.check import check, huggingface_logits, some_tokens
from megatron_fc.errors import UserError
from support import harness
from support.training_runs import config as config


@pytest.mark.slow
def test_exports_are_compared_with_their_checkpoints(config: Path, tmp_path: Path) -> None:
    run = [str(config), "connection=mhc", "qk_layernorm_over_heads=true"]

    def command(name: str, *words: str, ranks: int = 1) -> tuple[int, str]:
        codes = harness.run("command_line", ranks, tmp_path / name, words)
        assert len(set(codes)) == 1
        return codes[0], (tmp_path / name / "rank0.log").read_text()

    trained = ["train_iters=1", "eval_iters=1", "save_interval=1", "pipeline_model_parallel_size=2"]
    assert command("train", "train", *run, *trained, f"run_dir={tmp_path / 'run'}", ranks=2)[0] == 0
    out, source = tmp_path / "out", str(tmp_path / "run" / "checkpoints")
    assert command("export", "convert", "to-hf", source, *run, "--to", str(out))[0] == 0
    code, said = command("same", "convert", "check", source, str(out), *run, "--tolerance", "1e-5")
    assert code == 0
    assert f"logits of {source}/iter_0000001 and {out} on 64 tokens, in fp32: largest difference " in said
    with pytest.raises(UserError, match=r"out is ConnectedOlmoeForCausalLM, and the run of .* has residual"):
        check(config, ["connection=residual", "qk_layernorm_over_heads=true"], Path(source), out, 1e-4)
    refused = command("setting", "convert", "to-hf", source, *run, "norm_epsilon=0.5", "--to", str(tmp_path / "no"))
    assert refused[0] == 2
    assert "layernorm_epsilon: 1e-05 in " in refused[1]

    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"][0] += 0.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, said = command("other", "convert", "check", source, str(out), *run)
    assert code == 2
    assert "more than --tolerance 0.0001, so convert the checkpoint again" in said

    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-8].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"out cannot be loaded, .*: convert the checkpoint again"):
        huggingface_logits(out, some_tokens(384, 32))


def test_tokens_are_the_same_every_time() -> None:
    tokens = some_tokens(97, 32)
    assert torch.equal(tokens, some_tokens(97, 32))
    assert 0 <= int(tokens.min()) < 48 < int(tokens.max()) < 97

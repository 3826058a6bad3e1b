"""A run on devices without Transformer Engine and Apex: refused on its nodes, where Megatron could not read back."""

from pathlib import Path

import pytest

from megatron_fc import UserError
from megatron_fc.preflight import packages
from megatron_fc.preflight.requirements import requirements_of
from megatron_fc.training.recipe import load_recipe
from support.training_runs import config as config


@pytest.mark.parametrize(
    ("missing", "words", "refused"),
    [
        (("transformer_engine", "apex"), [], True),
        (("apex",), [], False),
        (("transformer_engine",), [], False),
        (("transformer_engine", "apex"), ["use_distributed_optimizer=false"], False),
        (("transformer_engine", "apex"), ["save_interval=null"], False),
        (("transformer_engine", "apex"), ["no_save_optim=true"], False),
        (("transformer_engine", "apex"), ["distributed_backend=gloo"], False),
    ],
)
def test_a_distributed_optimizer_that_could_not_be_read(
    missing: tuple[str, ...],
    words: list[str],
    refused: bool,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("transformer_engine", "apex"):
        monkeypatch.setattr(packages, f"has_{name}", lambda name=name: name not in missing)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    recipe = load_recipe(config, ["use_distributed_optimizer=true", f"run_dir={tmp_path}", *words])
    if not refused:
        assert requirements_of(recipe).on_devices == ("distributed_backend=gloo" not in words)
        return
    with pytest.raises(
        UserError, match=r"^use_distributed_optimizer: without Transformer Engine or Apex, .*: use the ima"
    ):
        requirements_of(recipe)

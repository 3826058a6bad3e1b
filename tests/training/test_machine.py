"""What is installed decides Megatron's flags: Apex, a part of it, or the other package of its name."""

import sys
from pathlib import Path

import pytest
import yaml

from megatron_fc.training.machine import adaptations, has_apex, has_fused_weight_gradients
from megatron_fc.training.recipe import load_recipe
from support.token_files import write_tokens

IMPOSTOR = ("apex/__init__.py",)
APEX = ("apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py")
FUSED = "fused_weight_gradient_mlp_cuda.py"
UNFUSED = "--no-gradient-accumulation-fusion"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put empty modules where Python finds them."""

    def put(*files: str) -> None:
        for file in files:
            path = tmp_path / "packages" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def settings() -> dict[str, object]:
    return {name: value for found in adaptations() for name, value in found.settings.items()}


def notes() -> str:
    return "; ".join(found.reason for found in adaptations())


def test_nothing_installed() -> None:
    assert not has_apex()
    assert settings()["no_gradient_accumulation_fusion"] is True
    assert "no Apex: weight gradients accumulate unfused" in notes()
    assert "is not NVIDIA's" not in notes()


def test_the_package_of_that_name_is_not_apex(install) -> None:
    install(*IMPOSTOR)
    assert not has_apex()
    assert "apex" not in sys.modules, "it was imported to find that out"
    assert "the package apex here is not NVIDIA's, and Megatron takes it for that: pip uninstall apex" in notes()
    assert settings()["no_gradient_accumulation_fusion"] is True


def test_apex_without_its_extension_for_weight_gradients(install) -> None:
    install(*APEX)
    assert has_apex()
    assert not has_fused_weight_gradients()
    assert settings()["no_gradient_accumulation_fusion"] is True
    assert "is not NVIDIA's" not in notes()


def test_whole_apex_leaves_the_fusion_on(install) -> None:
    install(*APEX, FUSED)
    assert has_apex()
    assert has_fused_weight_gradients()
    assert "no_gradient_accumulation_fusion" not in settings()
    assert "Apex" not in notes()


def test_local_layers_beside_transformer_engine_have_torchs_norms(install) -> None:
    """Which assert that nobody asks for Apex's persistent kernel."""
    install("transformer_engine/__init__.py")
    assert not any("no_persist_layer_norm" in found.settings for found in adaptations())
    (local,) = (found for found in adaptations("local") if "no_persist_layer_norm" in found.settings)
    assert local.settings == {"no_persist_layer_norm": True}


@pytest.mark.parametrize("files", [(), IMPOSTOR, APEX, (*APEX, FUSED)], ids=["none", "impostor", "apex", "whole apex"])
def test_a_run_gets_the_flag_and_says_so(files: tuple[str, ...], install, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", sequences=1000)
    config = tmp_path / "run.yaml"
    model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16}
    config.write_text(yaml.safe_dump({"model": model, "data": {"data_path": [str(tmp_path / "train")]}}))
    install(*files)
    recipe = load_recipe(config)
    whole = FUSED in files
    assert (UNFUSED in recipe.argv) == (not whole)
    assert any("accumulate unfused" in note for note in recipe.notes) == (not whole)
    assert any("pip uninstall apex" in note for note in recipe.notes) == (files == IMPOSTOR)

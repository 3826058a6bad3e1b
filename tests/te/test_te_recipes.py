"""Each name of `precision` is the recipe that Megatron makes for Transformer Engine."""

from contextlib import nullcontext
from typing import Any

import pytest

recipes = pytest.importorskip(
    "transformer_engine.common.recipe", reason="Transformer Engine is not installed: see `make test-te`"
)

from megatron.core.fp4_utils import get_fp4_recipe  # noqa: E402
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe  # noqa: E402

from megatron_fc.training.precision import config_fields  # noqa: E402
from support import tiny  # noqa: E402


def config(precision: str, **options: Any) -> Any:
    return tiny.transformer_config("dense", **config_fields(precision), **options)


@pytest.mark.parametrize(
    ("precision", "kind", "data"),
    [
        ("fp8_delayed", "DelayedScaling", "HYBRID"),
        ("fp8_tensorwise", "Float8CurrentScaling", "HYBRID"),
        ("fp8_blockwise", "Float8BlockScaling", "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", "E4M3"),
    ],
)
def test_fp8(precision: str, kind: str, data: str) -> None:
    recipe = get_fp8_recipe(config(precision))
    assert isinstance(recipe, getattr(recipes, kind))
    assert recipe.fp8_format == getattr(recipes.Format, data)
    if precision == "fp8_delayed":
        assert (recipe.amax_history_len, recipe.amax_compute_algo) == (1024, "max")


def test_fp4() -> None:
    assert isinstance(get_fp4_recipe(config("nvfp4")), recipes.NVFP4BlockScaling)


def test_first_and_last_layers_stay_in_bf16() -> None:
    chosen = config("fp8_tensorwise", num_layers=4, first_last_layers_bf16=True)
    kept = [isinstance(get_fp8_context(chosen, layer), nullcontext) for layer in range(4)]
    assert kept == [True, False, False, True]

import dataclasses

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.reference import Config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rate": 0}, "rate must be a whole number of at least 1, not 0"),
        ({"rate": 2.0}, "rate must be a whole number"),
        ({"rate": True}, "rate must be a whole number"),
        ({"norm": "rmsnrm"}, "unknown norm 'rmsnrm': did you mean 'rmsnorm'?"),
        ({"tanh": "yes"}, "tanh must be true or false"),
        ({"recompute": 1}, "recompute must be true or false"),
        ({"initial_scale": float("nan")}, "initial_scale must be a finite number"),
        ({"norm_eps": 0.0}, "norm_eps must be at least 1e-30"),
        ({"dynamic": False, "tanh": False}, "tanh=False has no effect on static connections"),
        ({"dynamic": False, "norm_affine": False}, "norm_affine=False has no effect on static connections"),
        ({"norm": "none", "norm_affine": False}, "norm_affine=False has no effect with norm=none"),
        ({"dynamic": False, "dynamic_beta": True}, "dynamic_beta=True contradicts dynamic=false: set dynamic=true and"),
        ({"dynamic_beta": False, "dynamic_alpha": False}, "leave nothing dynamic: set dynamic=false instead"),
        ({"dynamic_alpha": "no"}, "dynamic_alpha must be true or false, not 'no'"),
        ({"scale": False, "initial_scale": 0.1}, "initial_scale=0.1 has no effect with scale=false"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")) as error:
        FracConfig(**values)
    assert "\n" not in str(error.value)


def test_rate_that_does_not_divide_the_width_names_fitting_ones() -> None:
    with pytest.raises(UserError, match=r"rate=3 does not divide hidden_size=64: .* 1, 2, 4, 8"):
        FracConfig(rate=3).slot_width(64)


def test_dict_round_trip_and_unknown_key() -> None:
    config = FracConfig(rate=8, norm="layernorm", tanh=False)
    assert FracConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="unknown frac option 'rat': did you mean 'rate'"):
        FracConfig.from_dict({"rat": 4})


def test_recompute_goes_with_every_connection_and_makes_it_no_other() -> None:
    for dynamic in (True, False):
        config = FracConfig(dynamic=dynamic, recompute=True)
        assert config == FracConfig(dynamic=dynamic)
        assert FracConfig.from_dict(config.to_dict()).recompute


@pytest.mark.parametrize("kind", [HyperConfig, ManifoldConfig])
def test_recompute_of_the_stream_makes_it_no_other_connection(kind: type[Config]) -> None:
    config = kind.from_dict({"stream_layers": 2})
    assert config == kind()
    assert kind.from_dict(config.to_dict()).stream_layers == 2
    for value in (-1, True, 1.5):
        with pytest.raises(UserError, match=f"stream_layers must be a whole number of at least 0, not {value}: use 0"):
            kind.from_dict({"stream_layers": value})


def test_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FracConfig().rate = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rate", "dynamic", "total"),
    [(4, True, 165_056), (2, True, 196_992), (8, True, 151_872), (4, False, 1_152), (2, False, 320)],
)
def test_parameters_of_the_papers_7b_model(rate: int, dynamic: bool, total: int) -> None:
    layers, width = 16, 2048
    assert 2 * layers * FracConfig(rate=rate, dynamic=dynamic).parameter_count(width) == total


def test_labels() -> None:
    assert FracConfig(rate=4).label == "dfc_x4"
    assert FracConfig(rate=2, dynamic=False).label == "sfc_x2"


@pytest.mark.parametrize(("rows", "options"), [(1, {"dynamic_alpha": False}), (8, {"dynamic_beta": False})])
def test_what_is_static_has_no_rows_and_no_scale(rows: int, options: dict) -> None:
    shapes = FracConfig(rate=4, **options).parameter_shapes(64)
    assert shapes["dynamic_weight"] == (rows, 16)
    assert ("scale_beta" in shapes) == (rows == 1)
    assert ("scale_alpha" in shapes) == (rows == 8)


def test_a_switch_that_repeats_dynamic_makes_no_other_connection() -> None:
    assert FracConfig(dynamic_beta=True, dynamic_alpha=True) == FracConfig()
    assert FracConfig(dynamic=False, dynamic_beta=False) == FracConfig(dynamic=False)
    assert FracConfig(dynamic_beta=False) != FracConfig()
    partial = FracConfig(dynamic_beta=False)
    assert FracConfig.from_dict(partial.to_dict()) == partial
    assert dataclasses.replace(FracConfig(dynamic_beta=True), dynamic=False) == FracConfig(dynamic=False)


def test_a_norm_without_weight_has_no_parameter() -> None:
    assert "norm_weight" not in FracConfig(norm_affine=False).parameter_shapes(64)
    assert 32 * FracConfig(rate=4, norm_affine=False).parameter_count(2048) == 165_056 - 32 * 512

"""fp32 parameters in a bf16 model under Megatron's distributed optimizer: every parameter finds its own state."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from megatron_fc import FracConfig, FracConnection, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.parameter_order import connection_parameters_first, install_order
from support import tiny
from support.half_precision import BF16, trained

KINDS = ("moe", "mixed", "mla", "mtp", "hybrid")
DFC, DHC, LEARNED = FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")


def misplaced(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """Parameters whose main copy, as a checkpoint would write it, is not theirs."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    wrong = []
    for name, parameter in model.named_parameters():
        owner = next(o for o in inner if parameter in o.model_param_group_index_map)
        main = owner._get_main_param_and_optimizer_states(parameter)["param"]
        same = main.numel() == parameter.numel() and torch.equal(main.to(parameter.dtype), parameter.flatten())
        if not same:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    "connection", [DFC, FracConfig(rate=2, dynamic=False), DHC, LEARNED], ids=["dfc", "sfc", "dhc", "mhc"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_finds_its_state(kind: str, connection: ConnectionConfig) -> None:
    assert misplaced(*trained(kind, connection, ordered=True)) == []


@pytest.mark.parametrize("connection", [DFC, LEARNED], ids=["dfc", "mhc"])
def test_control_megatrons_own_order_misplaces_state(connection: ConnectionConfig) -> None:
    assert len(misplaced(*trained("moe", connection, ordered=False))) > 10


@pytest.mark.parametrize(
    ("connection", "sharding"),
    [(DFC, "dp_reshardable"), (DFC, "fully_reshardable"), (DHC, "dp_reshardable"), (LEARNED, "fully_reshardable")],
    ids=lambda value: getattr(value, "label", value),
)
def test_checkpoint_is_written_and_holds_fp32(connection: ConnectionConfig, sharding: str, tmp_path: Path) -> None:
    model, optimizer = trained("moe", connection, ordered=True)
    metadata = {"distrib_optim_sharding_type": sharding}
    state = {"model": unwrap_model(model).sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=metadata)
    dist_checkpointing.save(state, str(tmp_path))
    stored = dist_checkpointing.load_tensors_metadata(str(tmp_path))
    assert {t.dtype for key, t in stored.items() if ".connection." in key} == {torch.float32}


@pytest.mark.parametrize(("kind", "connection"), [*((kind, DFC) for kind in KINDS), ("mtp", DHC), ("hybrid", LEARNED)])
def test_only_the_order_of_registration_changes(kind: str, connection: ConnectionConfig) -> None:
    plain, ordered = (tiny.build(kind, connection, **BF16).module for _ in range(2))
    connection_parameters_first([ordered])
    assert sorted(name for name, _ in plain.named_parameters()) == sorted(
        name for name, _ in ordered.named_parameters()
    )
    assert [type(m) for m in plain.decoder.layers] == [type(m) for m in ordered.decoder.layers]
    assert torch.equal(tiny.logits(ordered, tiny.tokens()), tiny.logits(plain, tiny.tokens()))
    first = next(iter(ordered.named_parameters()))[0]
    assert first.endswith(f"connection.{connection.parameter_names[0]}")


def test_full_precision_and_plain_models_are_left_alone() -> None:
    for model in (tiny.build("moe", DFC), tiny.build("moe", None, **BF16).module):
        before = [name for name, _ in model.named_parameters()]
        assert connection_parameters_first([model]) == [model]
        assert [name for name, _ in model.named_parameters()] == before


def test_a_first_layer_without_connection_is_refused() -> None:
    model = tiny.build("moe", DFC, **BF16).module
    layer = model.decoder.layers[0]
    for slot in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer, slot, torch.nn.RMSNorm(tiny.WIDTH))
    assert not any(isinstance(child, FracConnection) for child in layer.modules())
    with pytest.raises(UserError, match="the first layer has no connection"):
        connection_parameters_first([model])


def test_hook_is_installed_once_and_noted() -> None:
    config, args = SimpleNamespace(pre_wrap_hooks=[]), SimpleNamespace()
    install_order(config, args)
    install_order(config, None)
    assert config.pre_wrap_hooks == [connection_parameters_first]
    assert args.connection_parameters_first

"""A stream that is wider than the model: its beginning and end, what carries it, and what is said otherwise."""

import copy
import dataclasses
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError
from megatron_fc.megatron.model_config import scale_output_projections
from megatron_fc.megatron.slots import NormSlot
from megatron_fc.megatron.specs import block_spec, connect
from megatron_fc.megatron.stream import exchange_shapes, widen
from support import tiny
from support.megatron_world import parallel_state as parallel_state

DHC, MHC = HyperConfig(slots=4), ManifoldConfig(slots=4)
KINDS = [FracConfig(rate=4), DHC, HyperConfig(slots=4, fractions=2), MHC, ManifoldConfig(slots=4, fractions=4)]
LEARNED = ManifoldConfig(slots=4, leave="learned")

pytestmark = pytest.mark.usefixtures("parallel_state")


def slots(model: torch.nn.Module) -> list[NormSlot]:
    return [module for module in model.modules() if isinstance(module, NormSlot)]


@pytest.mark.parametrize("kind", ["dense", "mixed", "mla", "mtp", "hybrid"])
@pytest.mark.parametrize("connection", [DHC, HyperConfig(slots=4, fractions=2)], ids=lambda c: c.label)
def test_hyper_connections_start_as_the_residual_model(kind: str, connection: HyperConfig) -> None:
    """To the bit: equal streams, each read by one, and the mean of four equal numbers."""
    t = tiny.tokens()
    assert torch.equal(tiny.logits(tiny.build(kind, connection), t), tiny.logits(tiny.build(kind, None), t))


@pytest.mark.parametrize("kind", ["mixed", "hybrid"])
@pytest.mark.parametrize("connection", [*KINDS, LEARNED], ids=lambda c: c.label)
def test_all_other_weights_start_as_in_the_residual_model(kind: str, connection: ConnectionConfig) -> None:
    plain = dict(tiny.build(kind, None).named_parameters())
    connected = {
        name.replace("layernorm.norm.", "layernorm."): parameter
        for name, parameter in tiny.build(kind, connection).named_parameters()
        if not is_connection_key(name)
    }
    assert connected.keys() == plain.keys()
    assert all(torch.equal(parameter, plain[name]) for name, parameter in connected.items())


def test_sites_draw_their_own_values() -> None:
    """Every site others, the same again for the same seed."""
    drawn = [slot.connection.mapping_weight for slot in slots(tiny.build("dense", MHC))]
    again = [slot.connection.mapping_weight for slot in slots(tiny.build("dense", MHC))]
    other = [slot.connection.mapping_weight for slot in slots(tiny.build("dense", MHC, seed=2))]
    assert len({float(weight.sum()) for weight in [*drawn, *other]}) == 8
    assert all(torch.equal(one, two) for one, two in zip(drawn, again, strict=True))


@pytest.mark.parametrize(
    ("kind", "sub_layers"), [("dense", [0, 1, 2, 3]), ("hybrid", [0, 1, 2, 3]), ("mtp", [0, 1, 2, 3, 0, 1])]
)
def test_inputs_start_as_the_streams_in_turn(kind: str, sub_layers: list[int]) -> None:
    gammas = [slot.connection.static_gamma for slot in slots(tiny.build(kind, HyperConfig(slots=3)))]
    assert [int(gamma.argmax()) for gamma in gammas] == [number % 3 for number in sub_layers]


def test_values_that_were_trained_stay_when_a_slot_is_registered_again() -> None:
    model = tiny.build("dense", MHC)
    tiny.randomise_connections(model)
    layer = model.decoder.layers[0]
    before = layer.input_layernorm.connection.mapping_weight.clone()
    layer.input_layernorm = layer.input_layernorm
    assert torch.equal(layer.input_layernorm.connection.mapping_weight, before)


def test_streams_of_mhc_differ_after_ten_steps() -> None:
    """They start as copies, and a random mapping tells them apart."""
    model, streams = tiny.build("dense", MHC), []
    model.decoder.final_layernorm.connection.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(10):
        optimizer.zero_grad()
        tiny.loss(model, tiny.tokens(step)).backward()
        optimizer.step()

    def spread(stream: torch.Tensor) -> float:
        parts = stream.detach().unflatten(-1, (4, -1))
        return float((parts - parts.mean(-2, keepdim=True)).norm() / parts.norm())

    assert spread(streams[-1]) > 1e-3


@pytest.mark.parametrize("stage", ["decoder.final_layernorm", "mtp.layers.0.final_layernorm"])
def test_a_learned_leave_lies_in_the_final_norm(stage: str) -> None:
    model = tiny.build("mtp", LEARNED)
    names = [f"{stage}.connection.leave_{name}" for name in ("weight", "bias", "scale")]
    assert set(names) <= set(model.state_dict())
    tiny.loss(model, tiny.tokens()).backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)


def config(**options: Any) -> TransformerConfig:
    return tiny.transformer_config("dense", pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **options)


class Chunk(torch.nn.Module):
    """As a wrapper of Megatron's has it: a config."""

    pre_process, post_process = True, True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config


def test_a_widened_chunk_shows_the_streams_width_to_the_schedule_alone() -> None:
    chunk, plain = Chunk(config()), config()
    inner = chunk.config
    assert widen([chunk], DHC) == [chunk]
    assert (chunk.config.hidden_size, inner.hidden_size) == (4 * tiny.WIDTH, tiny.WIDTH)
    inner.variable_seq_lengths = True
    assert not chunk.config.variable_seq_lengths
    chunk.config.grad_scale_func = abs
    assert inner.grad_scale_func is abs
    assert isinstance(chunk.config, TransformerConfig)
    for same in (copy.copy(chunk.config), copy.deepcopy(chunk.config)):
        assert type(same) is TransformerConfig
        assert same.hidden_size == tiny.WIDTH
    chunk.config.grad_scale_func = None
    assert pickle.loads(pickle.dumps(chunk.config)).hidden_size == plain.hidden_size
    assert dataclasses.asdict(copy.copy(chunk.config))["hidden_size"] == tiny.WIDTH


@pytest.mark.parametrize(
    "connection", [FracConfig(rate=4), ManifoldConfig(slots=2, fractions=2)], ids=lambda c: c.label
)
def test_a_stream_of_the_models_width_needs_nothing(connection: ConnectionConfig) -> None:
    chunk = Chunk(config())
    inner = chunk.config
    widen([chunk], connection)
    assert chunk.config is inner


def test_a_chunk_is_widened_once() -> None:
    chunk = Chunk(config())
    view = widen([chunk], DHC)[0].config
    assert widen(chunk, DHC).config is view


def test_without_pipeline_stages_nothing_is_widened() -> None:
    model = tiny.build("dense", DHC)
    assert widen(model, DHC).config.hidden_size == tiny.WIDTH


@pytest.mark.parametrize(
    ("connection", "sentence"),
    [
        (HyperConfig(slots=2), r"the layers have a stream of 256 .*\(dhc_x4\), and dhc_x2 has 128: give widen the"),
        (FracConfig(rate=4), r"\(dhc_x4\), and dfc_x4 has 64: give widen the configuration that connect was given"),
        ([], r"widen takes the models and the configuration of their connections, not \[\]"),
    ],
)
def test_widen_is_given_the_layers_configuration(connection: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        widen([tiny.build("dense", DHC)], connection)


def test_a_model_without_connections_is_not_widened() -> None:
    with pytest.raises(UserError, match=r"no layer of the model has connections: build it from connect\(spec, HyperC"):
        widen(tiny.build("dense", None), DHC)


def test_where_nobody_widens_the_first_forward_pass_says_so() -> None:
    model = tiny.build("dense", DHC)
    for slot in slots(model):
        slot.stream.is_carried = False  # as it is where the pipeline has two stages
    with pytest.raises(UserError, match=r"dhc_x4 has a stream of 256 values .* call .*widen\(models, config\)"):
        tiny.logits(model, tiny.tokens())
    model.config.pipeline_model_parallel_size = 2
    widen(model, DHC)
    tiny.logits(model, tiny.tokens())


def test_a_stream_that_a_stage_has_cut_is_noticed() -> None:
    model = tiny.build("dense", DHC)
    with pytest.raises(UserError, match=r"a pipeline stage sent hidden_size=64 .* has 256: let every rank call"):
        model.decoder.layers[1](torch.zeros(tiny.SEQUENCE, 2, tiny.WIDTH))
    model.decoder.layers[0](torch.zeros(tiny.SEQUENCE, 2, tiny.WIDTH), attention_mask=None)


def test_a_stage_checks_what_it_sends() -> None:
    model = tiny.build("dense", DHC)
    model.post_process, model.config.pipeline_model_parallel_size = False, 2
    widen([model], DHC)
    # Layers that let the model's width through, as plain ones of a class that `widen` does not know would.
    model.decoder.layers, model.decoder.final_layernorm = torch.nn.ModuleList(), None
    with pytest.raises(
        UserError, match="would send 64 values per token, and the next one takes 256: connect the layers"
    ):
        tiny.logits(model, tiny.tokens())


def test_shapes_are_exchanged_where_nobody_widens_and_it_is_announced() -> None:
    given = config(moe_token_dispatcher_type="alltoall")
    with pytest.warns(UserWarning, match="dhc_x4: nobody can widen .* waits for the device once per message"):
        exchange_shapes(DHC, given)
    assert given.variable_seq_lengths
    exchange_shapes(DHC, given)  # told once


def test_layouts_that_cannot_exchange_shapes_are_refused() -> None:
    stages = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": False}
    with pytest.raises(UserError, match="without overlap_p2p_comm, where the schedule would hang"):
        exchange_shapes(DHC, config(num_layers=4, **stages))


def test_a_layer_alone_has_no_end() -> None:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    with pytest.raises(UserError, match=r"TransformerLayer has no final norm, .* streams of mhc_x4 .*block_spec"):
        connect(layer, MHC)
    block = connect(block_spec(layer, tiny.transformer_config("dense")), MHC)
    assert len(block.layer_specs) == 2
    block.layer_norm = None
    with pytest.raises(UserError, match="TransformerBlockSubmodules has no final norm"):
        connect(dataclasses.replace(block, layer_specs=[layer]), MHC)


def test_output_projections_of_hyper_connections_start_larger() -> None:
    """By sqrt(n), once; those of no other kind, nor with the option off."""
    given = tiny.transformer_config("dense", output_layer_init_method=partial(torch.nn.init.constant_, val=3.0))
    weight = torch.empty(2, 3)
    for connection, started in (
        (FracConfig(rate=4), 3.0),
        (MHC, 3.0),
        (dataclasses.replace(DHC, scale_output_init=False), 3.0),
        (DHC, 6.0),
        (DHC, 6.0),
    ):
        scale_output_projections(given, connection)
        given.output_layer_init_method(weight)
        assert torch.equal(weight, torch.full((2, 3), started))


def test_a_plain_start_of_hyper_connections_is_announced_unless_asked_for() -> None:
    with pytest.warns(UserWarning, match="dhc_x4 starts with output projections of the plain size: .* or set"):
        tiny.build("dense", DHC)
    with warnings.catch_warnings(record=True) as said:
        tiny.build("dense", dataclasses.replace(DHC, scale_output_init=False))
    assert not [warning for warning in said if "output projections" in str(warning.message)]

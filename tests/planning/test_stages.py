"""Layers of pipeline stages: the same as Megatron's, and the layouts that it refuses."""

from itertools import product

import pytest
import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_fc.planning.layout import Layout
from megatron_fc.planning.stages import EVENLY, Chunk, Split, chunks, parsed
from support.fake_world import rank_of
from support.megatron_world import parallel_state as parallel_state

BOTH = Split(with_embedding=True, with_loss=True)
SPLITS = [
    (16, 4, 2, EVENLY),
    (94, 8, 4, BOTH),
    (126, 8, 2, BOTH),
    (15, 4, 1, Split(with_loss=True)),
    (15, 2, 4, Split(with_embedding=True)),
    (22, 4, 2, Split(first=4)),
    (20, 4, 1, Split(first=3, last=5)),
    (20, 4, 2, Split(first=4, last=4)),
    (9, 2, 1, Split(last=4)),
]


@pytest.mark.parametrize(("layers", "pipeline", "virtual", "split"), SPLITS)
def test_layers_are_megatrons(layers: int, pipeline: int, virtual: int, split: Split) -> None:
    assert split.problem(layers, pipeline, virtual) is None
    layout = Layout(
        nodes=1, gpus_per_node=pipeline, pipeline=pipeline, virtual_pipeline=virtual, micro_batch=1, global_batch=8,
        heads=4, layers=layers,
    )  # fmt: skip
    for rank in range(pipeline):
        with rank_of(layout, rank):
            config = TransformerConfig(
                num_layers=layers,
                hidden_size=8,
                num_attention_heads=4,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                pipeline_dtype=torch.bfloat16,
                account_for_embedding_in_pipeline_split=split.with_embedding,
                account_for_loss_in_pipeline_split=split.with_loss,
                num_layers_in_first_pipeline_stage=split.first,
                num_layers_in_last_pipeline_stage=split.last,
            )
            built = []
            for number in range(virtual):
                stage = number if virtual > 1 else None
                start = get_transformer_layer_offset(config, stage)
                built.append(range(start, start + get_num_layers_to_build(config, stage)))
        dealt = [chunk.layers for chunk in chunks(layers, pipeline, virtual, split)[rank]]
        assert [list(layers) for layers in dealt] == [list(layers) for layers in built]


@pytest.mark.parametrize("text", ["Et*3|(tt|)*6,m|L", "Ettt|(t*4|)*2tmL", "E|t|(tt|)*2L"])
def test_strings_are_megatrons(text: str) -> None:
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parsed(text) == tuple("".join(letters[layer.name] for layer in stage) for stage in theirs)


def test_a_string_says_what_every_chunk_holds() -> None:
    split = Split(stages=parsed("Et|tt|tt|tm|L"))
    assert split.problem(6, 5, 1) is None
    dealt = chunks(6, 5, 1, split)
    assert dealt[0] == (Chunk(range(0, 1), embedding=True),)
    assert dealt[3] == (Chunk(range(5, 6), prediction=True),)
    assert dealt[4] == (Chunk(range(6, 6), loss=True),)
    evenly = chunks(8, 2, 2, EVENLY)
    assert evenly[1] == (Chunk(range(2, 4)), Chunk(range(6, 8), loss=True, prediction=True))


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (EVENLY, "pipeline_model_parallel_size=4 with 1 stages per rank does not divide num_layers=6"),
        (BOTH, None),
        (Split(with_loss=True), "does not divide num_layers=6 and the loss"),
        (Split(first=1), "num_layers=6 without the 1 of"),
        (Split(first=1, with_loss=True), "num_layers=6 cannot count the loss as layers beside numbers"),
        (Split(first=1, last=1), None),
        (Split(stages=parsed("Ett|tt|tt")), "has 3 stages, no multiple of pipeline_model_parallel_size=4"),
        (Split(stages=parsed("ttE|tt|tt|L")), "must begin with its only E and end with its only L"),
        (Split(stages=parsed("Ett|tt|t|L")), "has 5 layers, and num_layers=6"),
        (Split(stages=parsed("Ett|mt|tt|tL")), "has layers behind the multi-token prediction"),
        (Split(stages=parsed("Ett|tt|ttm|mL")), "has multi-token prediction in several stages"),
    ],
)
def test_refusals(split: Split, sentence: str | None) -> None:
    problem = split.problem(6, 4, 1)
    assert problem == sentence if sentence is None else sentence in str(problem)


def test_a_letter_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="has x, which is none of E"):
        parsed("Et|x|L")


def test_no_layer_is_lost() -> None:
    for layers, pipeline, virtual, split in product((30, 94, 126), (1, 2, 4, 8), (1, 2, 4), (EVENLY, BOTH)):
        if split.problem(layers, pipeline, virtual) is None:
            held = [index for rank in chunks(layers, pipeline, virtual, split) for one in rank for index in one.layers]
            assert sorted(held) == list(range(layers))

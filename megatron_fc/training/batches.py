"""Data sets, batches and the loss for Megatron's training loop: plain next-token pretraining on indexed data."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_fc.training.prepared_index import refuse_without_index, trusts_index
from megatron_fc.training.token_data import TokenDataConfig, TokenDataset, versions

_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
_SPIKE = 10.0  # times the largest of the first losses, as in Megatron's pretrain_gpt.py


def datasets(sample_counts: Any, vp_stage: int | None = None) -> Any:
    """Build Megatron's train, validation and test sets (its `train_valid_test_dataset_provider`)."""
    args = get_args()
    config, built_here = data_config(args), partial(_needs_data, vp_stage)
    if trusts_index(args):
        refuse_without_index(args, config, sample_counts, built_here)
    dataset = MockGPTDataset if args.mock_data else TokenDataset
    return BlendedMegatronDatasetBuilder(dataset, sample_counts, built_here, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it, Megatron asks by this mark


def data_config(args: Namespace) -> TokenDataConfig:
    """Return the configuration of a run's data sets; all ranks call it."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return TokenDataConfig(
        vocabulary=args.padded_vocab_size or args.vocab_size,
        versions={} if args.mock_data else versions(args),
        mask_repetitions=args.mask_repetitions,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def next_token_loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what Megatron takes of a micro-batch: the summed loss [], the tokens that count [], and what is logged.

    Args:
        loss_mask: [b, s], 1 for a token that counts.
        output: [b, s], each token's loss.
    """
    mask = loss_mask.view(-1).float()
    total = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    _validate(total)
    return total, tokens, {"lm loss": torch.cat([total.detach().view(1), tokens.view(1)])}


def forward_step(
    data_iterator: Any, model: Any, return_schedule_plan: bool = False, loss: Callable[..., Any] = next_token_loss
) -> tuple[Any, Any]:
    """Run one micro-batch; returns the output and the function that makes a loss of it."""
    batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    run = model.build_schedule_plan if return_schedule_plan else model
    return run(*inputs, **targets), partial(loss, batch["loss_mask"])


def _needs_data(vp_stage: int | None = None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(vp_stage)


def _has_mtp(vp_stage: int | None) -> bool:
    args = get_args()
    return mtp_on_this_rank(
        layout=args.pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    has_mtp = _has_mtp(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not has_mtp:
        return dict.fromkeys(_KEYS)
    args, rank = get_args(), mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in _KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def _validate(loss: Tensor) -> None:
    """Megatron's checks of a loss, as its entry points make them: NaN and Inf end the run, a spike is a warning."""
    args, machine = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        found = "found {} in local forward loss calculation"
        checks += [(torch.isnan, found.format("NaN"), True), (torch.isinf, found.format("Inf"), True)]
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks.append((is_spike, "Spiky loss", False))
    for rejection, message, fatal in checks:
        machine.validate_result(loss, rejection, message, tolerance=0.0, fatal=fatal)

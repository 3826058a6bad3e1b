"""OLMoE-7B's layers as a real Megatron model on one rank, with Megatron's mixed-precision training and optimizer."""

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core import tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc import FracConfig
from megatron_fc.megatron.specs import connect
from megatron_fc.training.machine import has_apex, has_transformer_engine
from megatron_fc.training.precision import config_fields

logging.getLogger("megatron.core").setLevel(logging.ERROR)  # a line for every parameter otherwise


@dataclass(frozen=True)
class Size:
    """What a model's layers, head and sequences measure."""

    layers: int
    width: int
    heads: int
    experts: int
    experts_per_token: int
    expert_width: int
    sequence: int
    vocabulary: int


OLMOE_7B = Size(16, 2048, 16, 64, 8, 1024, 4096, 50304)
TINY = Size(2, 64, 4, 4, 2, 32, 8, 128)


def uses_transformer_engine() -> bool:
    return has_transformer_engine() and not cpu_lane.needed()


def transformer_config(
    size: Size, layers: int, fused_residual: bool = False, precision: str = "bf16", **options: Any
) -> TransformerConfig:
    """OLMoE's architecture and losses; every fusion of Megatron's that is there to be used."""
    te, on_cpu = uses_transformer_engine(), cpu_lane.needed()
    return TransformerConfig(
        num_layers=layers,
        transformer_impl="transformer_engine" if te else "local",
        hidden_size=size.width,
        num_attention_heads=size.heads,
        ffn_hidden_size=size.expert_width,
        num_moe_experts=size.experts,
        moe_router_topk=size.experts_per_token,
        moe_ffn_hidden_size=size.expert_width,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=0.001,
        moe_router_pre_softmax=True,
        moe_grouped_gemm=te,
        moe_permute_fusion=te,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=not on_cpu,
        bias_activation_fusion=not on_cpu,
        apply_rope_fusion=te,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=has_apex() and not on_cpu,
        persist_layer_norm=False,
        fused_residual_rmsnorm=fused_residual,
        use_cpu_initialization=on_cpu,
        attention_backend=AttnBackend.auto if te else AttnBackend.unfused,
        **config_fields(precision),
        **options,
    )


class Trainee:
    """A model with its optimizer. The seed makes all that residual and FC models share the same.

    Args:
        size: of its layers.
        layers: how many.
        frac: None for plain residuals.
        fused_residual: Megatron's `fused_residual_rmsnorm`.
        precision: a name of `megatron_fc.training.precision`.
        options: more fields of Megatron's TransformerConfig.

    Attributes:
        losses: mean cross-entropy of every step so far, before its update.
    """

    def __init__(
        self,
        size: Size,
        layers: int,
        frac: FracConfig | None,
        fused_residual: bool = False,
        precision: str = "bf16",
        **options: Any,
    ) -> None:
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        torch.manual_seed(1234)
        destroy_moe_metrics_tracker()  # it is global and sized for the number of layers that it saw first
        config = transformer_config(size, layers, fused_residual, precision, **options)
        spec: Any = get_gpt_decoder_block_spec(config, uses_transformer_engine(), normalization="RMSNorm")
        model = GPTModel(
            config,
            spec if frac is None else connect(spec, frac),
            vocab_size=size.vocabulary,
            max_sequence_length=size.sequence,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        model = Float16Module(config, model.cuda())
        data_parallel = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.losses: list[float] = []
        self.size, self.model = size, DistributedDataParallel(config, data_parallel, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=4e-4,
                weight_decay=0.1,
                adam_beta2=0.95,
                clip_grad=1.0,
                bf16=True,
                params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Train on tokens [micro-batches, sequences, length + 1]; seconds until the gradients are there, and in all.

        Raises:
            RuntimeError: the optimizer found no finite gradient.
        """
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(tokens),
            model=[self.model],
            num_microbatches=len(tokens),
            seq_length=self.size.sequence,
            micro_batch_size=tokens.shape[1],
        )
        torch.cuda.synchronize()
        with_gradients = time.perf_counter() - start
        succeeded, norm, _ = self.optimizer.step()
        if not succeeded:
            raise RuntimeError(f"the optimizer skipped the step, gradient norm {norm}")
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
        self.losses.append(torch.stack([losses["lm loss"] for losses in micro_batches]).mean().item())
        return with_gradients, whole

    def free(self) -> None:
        """Give the memory back: parameters, gradients, the optimizer's state.

        References alone do not: the hooks of Megatron's data parallelism hang on autograd's nodes and hold the model,
        whose dispatchers and optimizer hold those nodes, in circles that Python's collector cannot see.
        """
        parameters = list(self.model.parameters())
        inner = [chained.optimizer for chained in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]
        tensors = [
            *parameters,
            *(p.main_grad for p in parameters),
            *(p for optimizer in inner for group in optimizer.param_groups for p in group["params"]),
            *(value for optimizer in inner for state in optimizer.state.values() for value in state.values()),
        ]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                tensor.untyped_storage().resize_(0)


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, _mean


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach()}

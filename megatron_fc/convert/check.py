"""`megatron-fc convert check`: the logits of a checkpoint and of its export on the same tokens, both in fp32."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.compress.session import session
from megatron_fc.convert.one_rank import recipe_on_one_rank
from megatron_fc.errors import UserError

SEQUENCES, TOKENS = 2, 64


def check(config: Path, overrides: Sequence[str], source: Path, export: Path, tolerance: float) -> str:
    """Compare them; returns by how much they differ.

    Args:
        config, overrides: of the run that wrote the checkpoint.
        source: folder of checkpoints, or one of them.
        export: folder that `to_hf` wrote of it.
        tolerance: largest difference of a logit.

    Raises:
        UserError: the logits differ by more, or one of the two cannot be loaded.
    """
    if not (export / "config.json").is_file():
        raise UserError(f"{export} holds no config.json: give the folder that `megatron-fc convert to-hf` wrote")
    checkpoint, recipe = find_checkpoint(source), recipe_on_one_rank(config, overrides, fp32=True)
    name = str((json.loads((export / "config.json").read_text()).get("architectures") or [None])[0])
    if name.startswith("Connected") != (recipe.connection is not None):
        raise UserError(f"{export} is {name}, and the run of {checkpoint} has {recipe.label}: it is no export of it")
    with session(recipe, checkpoint) as run:
        tokens = some_tokens(run.args.padded_vocab_size, min(TOKENS, run.args.seq_length))
        expected = megatron_logits(run.model, tokens)
    found = huggingface_logits(export, tokens)
    if found.shape != expected.shape:
        raise UserError(
            f"{export} has {found.shape[-1]} tokens in its vocabulary, and {checkpoint} {expected.shape[-1]}: it is no "
            f"export of it"
        )
    difference = float((found - expected).abs().max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    said = (
        f"logits of {checkpoint} and {export} on {tokens.numel()} tokens, in fp32: largest difference {difference:.1e} "
        f"of values up to {float(expected.abs().max()):.3g}, the same next token {same} times"
    )
    if not difference <= tolerance:
        raise UserError(f"{said}: more than --tolerance {tolerance:g}, so convert the checkpoint again")
    return said


def some_tokens(vocabulary: int, length: int) -> Tensor:
    """Token numbers [SEQUENCES, length], always the same."""
    return torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(1))


def megatron_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocabulary] of a model on this rank, on the CPU."""
    device = next(model.parameters()).device
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    positions = torch.arange(length, device=device).expand_as(tokens)
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(tokens.to(device), positions, mask)
    return logits.float().cpu()


def huggingface_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocabulary] of the model in a folder, on the CPU; its own code is run.

    Raises:
        UserError: transformers does not load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    except Exception as error:  # of transformers, safetensors, torch and the folder's own code
        said = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be loaded, {said}: convert the checkpoint again") from None
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits.float()

"""A checkpoint's coefficients, cosines and gradients without `megatron_fc.analysis`, as JSON on standard output.

python direct_analysis.py CONFIG CHECKPOINTS SAMPLES [key=value ...]

The stream is carried along by hand: by the reference equations, from the embedding and what sub-layers return.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_fc.training import cpu_lane

cpu_lane.install()

from megatron.core.utils import unwrap_model  # noqa: E402

from megatron_fc.checkpoints.location import find_checkpoint  # noqa: E402
from megatron_fc.connections import ends, reference  # noqa: E402
from megatron_fc.connections.kinds import is_connection_key  # noqa: E402
from megatron_fc.training.loaded import load_model  # noqa: E402
from megatron_fc.training.recipe import load_recipe  # noqa: E402
from megatron_fc.training.setup import silence  # noqa: E402


def main(config: Path, checkpoints: Path, samples: int, *overrides: str) -> None:
    recipe = load_recipe(config, overrides)
    with silence():
        args, chunks, _ = load_model(recipe, find_checkpoint(checkpoints))
        model = unwrap_model(chunks)[0].eval()
        tokens = sequences(args, samples)
        returned: list[torch.Tensor] = []
        for layer in model.decoder.layers:
            for part in (layer.self_attention, layer.mlp):
                part.register_forward_hook(lambda _, __, output: returned.append(output[0]))
        embedded: list[torch.Tensor] = []
        model.embedding.register_forward_hook(lambda _, __, output: embedded.append(output))
        length = tokens.shape[1] - 1
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        losses = model(tokens[:, :-1], torch.arange(length).expand(samples, -1), mask, labels=tokens[:, 1:])
        losses.float().mean().backward()
        with torch.no_grad():
            found = along_the_stream(model, recipe.connection, embedded[0], returned)
    print(json.dumps(found | {"loss": float(losses.mean()), "gradients": gradients(model)}))


def sequences(args: Any, samples: int) -> torch.Tensor:
    """The samples that a validation set of so many begins with: token numbers [samples, s + 1], in any order."""
    from megatron_fc.training.batches import datasets

    valid = datasets((samples, samples, 0))[1]
    rows = [valid[number] for number in range(samples)]
    return torch.stack([torch.cat((row["tokens"], row["labels"][-1:])) for row in rows])


def along_the_stream(model: Any, connection: Any, h: torch.Tensor, returned: list[torch.Tensor]) -> dict[str, Any]:
    """Means of coefficients, medians of cosines, and the largest gain, from the reference's equations."""
    slots = [slot for layer in model.decoder.layers for slot in (layer.input_layernorm, layer.pre_mlp_layernorm)]
    h = h if connection is None else ends.enter(h, connection)
    means: list[dict[str, Any]] = []
    inputs, alphas = [], []
    for slot, o in zip(slots, returned, strict=True):
        if connection is None:
            inputs.append(h)
            h = h + o
            continue
        p = slot.connection.site_parameters()
        s = reference.slots(h, connection.slots)
        tables = {name: getattr(reference, name)(s, p, connection) for name in ("beta", "gamma", "alpha")}
        means.append({name: table.flatten(0, 1).mean(0).tolist() for name, table in tables.items()})
        alphas.append(tables["alpha"].flatten(0, 1))
        inputs.append(reference.width(h, p, connection))
        h = reference.depth(o, h, p, connection)
    cosines = [F.cosine_similarity(x, y, dim=-1).quantile(0.5) for x, y in zip(inputs[1:], inputs, strict=False)]
    found = {"sites": means, "medians": [float(cosine) for cosine in cosines]}
    if alphas:
        whole = alphas[0]
        for alpha in alphas[1:]:
            whole = torch.einsum("tij,tjk->tik", whole, alpha)
        found |= {"forward": float(whole.abs().sum(1).max(1).values.mean())}
        found |= {"backward": float(whole.abs().sum(2).max(1).values.mean())}
        found |= {"singular": float(torch.linalg.svdvals(whole)[:, 0].mean())}
    return found


def gradients(model: Any) -> list[list[float]]:
    """Norms per layer: of weights, and of connections."""
    norms = []
    for layer in model.decoder.layers:
        squares = [0.0, 0.0]
        for name, parameter in layer.named_parameters():
            squares[is_connection_key(name)] += float(parameter.grad.double().square().sum())
        norms.append([square**0.5 for square in squares])
    return norms


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])

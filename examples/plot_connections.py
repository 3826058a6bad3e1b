"""What the connections of a checkpoint learnt, as matrices: a PNG, without a notebook.

    python examples/plot_connections.py CHECKPOINTS [OUT.png]

CHECKPOINTS is a run's folder of checkpoints, or one iter_ folder in it: runs/demo/dfc_x4/checkpoints after `make demo`.
No model is built and no GPU is used. Drawn is the static part of Frac- and Hyper-Connections, minus its start: a column
per sub-layer in the order of the network, with alpha (how slots mix), gamma (what the sub-layer reads) and beta (where
its output goes). `megatron-fc analyze coefficients` has the dynamic part, too. You should see white panels for a model
at its start, coloured ones after training, and this line:

    8 sites, 4 slots: alpha is within ... of the identity, drawn in ...
"""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.checkpoints.stored_tensors import StoredTensors
from megatron_fc.errors import UserError

STATICS = ("static_alpha", "static_gamma", "static_beta")


def statics(checkpoint: Path) -> dict[str, list[Tensor]]:
    """Return alpha [n, n], gamma [n, m] and beta [n, 1] of each site, by the site's name, in the network's order."""
    stored = StoredTensors(checkpoint)
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(stored.keys()):
        site, _, name = key.rpartition(".")
        if name not in STATICS:
            continue
        value = stored.read(key).float()
        if value.ndim == 1:
            found.setdefault(site, {})[name] = value
        else:  # Megatron stacks layers of one kind: decoder.layers.input_layernorm... [layers, ...]
            for number, row in enumerate(value):
                found.setdefault(site.replace("layers.", f"layers.{number}.", 1), {})[name] = row
    if not found:
        raise UserError(f"{checkpoint} has no Frac- or Hyper-Connections: give one of an sfc, dfc, shc or dhc run")
    ordered = sorted(found, key=lambda site: (layer(site), "mlp" in site))
    return {
        site: [found[site][name].view(found[site]["static_beta"].numel(), -1) for name in STATICS] for site in ordered
    }


def layer(site: str) -> int:
    """Its number from 0."""
    return int(re.findall(r"\d+", site)[0])


def draw(sites: dict[str, list[Tensor]], out: Path) -> float:
    """Draw the differences to the start; returns the largest one of alpha."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = len(next(iter(sites.values()))[0])
    moved = {}
    for number, (site, (alpha, gamma, beta)) in enumerate(sites.items()):
        m = gamma.shape[1]
        start = torch.eye(n)[:, :m] if m > 1 else torch.eye(n)[:, [number % n]]  # Hyper-Connections read one slot each
        moved[site] = [alpha - torch.eye(n), gamma - start, beta - 1]
    limit = max(float(part.abs().max()) for parts in moved.values() for part in parts) or 1.0
    figure, axes = plt.subplots(3, len(moved), figsize=(1.4 * len(moved) + 1, 4.6), layout="constrained", squeeze=False)
    for column, (site, parts) in enumerate(moved.items()):
        part = "MLP" if "mlp" in site else "attention"
        axes[0, column].set_title(f"{layer(site)} {part}", fontsize=8)
        for row, matrix in enumerate(parts):
            image = axes[row, column].imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[row, column].set(xticks=[], yticks=[])
    for row, name in enumerate(("alpha - I", "gamma - start", "beta - 1")):
        axes[row, 0].set_ylabel(name)
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.savefig(out, dpi=140)
    plt.close(figure)
    return max(float(parts[0].abs().max()) for parts in moved.values())


def main(checkpoints: str, out: str = "connections.png") -> None:
    sites = statics(find_checkpoint(Path(checkpoints)))
    slots = len(next(iter(sites.values()))[0])
    largest = draw(sites, Path(out))
    print(f"{len(sites)} sites, {slots} slots: alpha is within {largest:.3f} of the identity, drawn in {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python examples/plot_connections.py CHECKPOINTS [OUT.png]")
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"plot_connections.py: {error}") from None

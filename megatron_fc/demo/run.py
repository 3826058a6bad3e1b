"""`megatron-fc demo`: the same small MoE with plain residuals and with Frac-Connections, on real text, compared."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_fc.data import build_demo_data
from megatron_fc.demo.seeds import among_seeds
from megatron_fc.errors import UserError
from megatron_fc.runs.plot import plot_losses
from megatron_fc.runs.summary import comparison_table, read_summary

CONFIG = Path(__file__).with_name("demo.yaml")
CONNECTIONS = {"residual": ["connection=residual"], "dfc_x4": ["connection=dfc", "rate=4"]}
TIME = "2 to 4 minutes each on two CPU cores"  # measured on two machines, see README.md


def run_demo(out: Path, data: Path, overrides: Sequence[str]) -> int:
    """Make the data, train both models with the same seed and data order, print a table and draw the curves.

    A run that has finished with the same settings is not trained again; one that was interrupted goes on from its
    last checkpoint.

    Args:
        out: folder of the runs.
        data: folder of the data.
        overrides: `key=value` for both runs.

    Returns:
        The exit code of the first run that failed, else 0.

    Raises:
        UserError: the data cannot be written.
    """
    from rich.console import Console

    from megatron_fc.training.recipe import load_recipe

    start = time.perf_counter()
    for line in _intention(out, data, has_overrides=bool(overrides)):
        print(line, flush=True)
    built = build_demo_data(data, report=print)
    files = [
        f"train_data_path=['{built.train_prefix}']",
        f"valid_data_path=['{built.valid_prefix}']",
        f"tokenizer_model={built.tokenizer}",
    ]
    for line in load_recipe(CONFIG, [*CONNECTIONS["dfc_x4"], *files, *overrides]).told():
        print(line, flush=True)
    for name, connection in CONNECTIONS.items():
        code = _train(name, [*connection, *files, *overrides, f"run_dir={out / name}"])
        if code:
            return code
    summaries = [summary for name in CONNECTIONS if (summary := read_summary(out / name))]
    Console().print(comparison_table(summaries))
    png = plot_losses([(name, out / name) for name in CONNECTIONS], out / "losses.png")
    print(f"curves  {png}")
    if not overrides:
        residual, connected = (summary["mean_last_loss"] for summary in summaries)
        print(f"seeds   {among_seeds(connected - residual)}")
    print(f"runs    {', '.join(str(out / name) for name in CONNECTIONS)}: summary.json, checkpoints, tensorboard, logs")
    print(f"time    {time.perf_counter() - start:.0f} s")
    return 0


def _intention(out: Path, data: Path, has_overrides: bool) -> list[str]:
    """Say what will be done, where it will be written, and how long it takes with the config as it is."""
    lines = [f"demo    writes its data to {data.resolve()} and its runs to {out.resolve()}; nothing is downloaded"]
    left = [name for name in CONNECTIONS if read_summary(out / name) is None]
    if left:
        lasting = "" if has_overrides else f", {TIME}"
        lines.append(f"        trains {' and then '.join(left)}{lasting}; interrupted, the same command goes on")
    return lines


def _train(name: str, overrides: list[str]) -> int:
    """Train one run in a process of its own, or one per GPU; skip it when it has finished with these settings."""
    from megatron_fc.training.recipe import load_recipe

    ranks, overrides = _spread_over_gpus(overrides)
    recipe = load_recipe(CONFIG, overrides)
    summary = read_summary(recipe.run_dir)
    if summary is not None and summary["config"] == recipe.sections:
        print(f"{name}  finished before with these settings, in {recipe.run_dir} (remove it to train again)")
        return 0
    if summary is not None:
        raise UserError(f"{recipe.run_dir} holds a run with other settings: remove it, or give another --out")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "megatron_fc", "train", str(CONFIG), "--brief", *overrides]
    return subprocess.run(command, check=False).returncode


def _spread_over_gpus(overrides: list[str]) -> tuple[int, list[str]]:
    """Data parallelism over the GPUs of this machine: as many as divide the global batch."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        return 1, overrides
    from megatron_fc.training.recipe import load_recipe

    batch = int(load_recipe(CONFIG, overrides).sections["optimizer"]["global_batch_size"])
    ranks = max(n for n in range(1, gpus + 1) if batch % n == 0)
    return ranks, [*overrides, f"micro_batch_size={batch // ranks}"]

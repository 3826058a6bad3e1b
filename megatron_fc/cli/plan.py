"""`megatron-fc plan`: what a run will need and take."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fc.cli.parsing import Commands

if TYPE_CHECKING:
    from megatron_fc.planning.devices import Device

SHARES = {
    "compute": "FLOP/s of linear layers",
    "compute-half": "FLOP/s of attention and output layer",
    "memory": "bandwidth",
    "nvlink": "bandwidth",
    "network": "bandwidth",
    "reserve": "of the memory, free",
}


def add(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate a config before it runs: memory, FLOPs, bytes, step time, days, topologies; needs no GPU",
        allow_abbrev=False,
        usage="megatron-fc plan CONFIG.yaml [key=value ...] --nodes N --gpu NAME [--gpus-per-node G]\n"
        "       [--sweep] [--json] [--network-gb-per-second B] [--nvlink-gb-per-second B]\n"
        "       [--compute S] [--compute-half S] [--memory S] [--nvlink S] [--network S] [--launch US] [--reserve S]",
    )
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. tensor_model_parallel_size=2")
    plan.add_argument("--nodes", type=int, required=True, metavar="N")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="a100, h100, h200, b200, gb200, b300 or gb300")
    plan.add_argument("--gpus-per-node", type=int, metavar="G", help="default: of the GPU's usual machine")
    plan.add_argument("--network-gb-per-second", type=float, metavar="B", help="per GPU; default: of its usual machine")
    plan.add_argument("--nvlink-gb-per-second", type=float, metavar="B", help="per GPU; default: of its data sheet")
    plan.add_argument("--sweep", action="store_true", help="rank other topologies by estimated speed")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    shares = plan.add_argument_group("shares of data-sheet peaks, in place of those fitted to published runs")
    for share, of in SHARES.items():
        shares.add_argument(f"--{share}", type=float, metavar="SHARE", help=of)
    shares.add_argument("--launch", type=float, metavar="US", help="microseconds of the host for a kernel")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.planning.calibration import refuse_impossible
    from megatron_fc.planning.devices import device

    gpu = device(args.gpu)
    names = [name.replace("-", "_") for name in SHARES] + ["launch"]
    assumed = {name: value for name in names if (value := getattr(args, name)) is not None}
    refuse_impossible(assumed)
    from megatron_fc.preflight.torch_names import with_names

    return with_names(lambda: _print(args, gpu, assumed), is_process=args.is_process)


def _print(args: argparse.Namespace, gpu: "Device", assumed: dict[str, float]) -> int:
    from rich.console import Console

    from megatron_fc.planning.sweep import sweep
    from megatron_fc.planning.table import plan_table, sweep_table
    from megatron_fc.preflight.estimate import plan_of

    plan = plan_of(
        args.config,
        args.overrides,
        args.nodes,
        gpu,
        gpus_per_node=args.gpus_per_node,
        network=args.network_gb_per_second,
        nvlink=args.nvlink_gb_per_second,
        assumed=assumed,
    )
    found = sweep(plan) if args.sweep else None
    if args.json:
        print(json.dumps(plan.to_dict() | ({"sweep": found.to_dict()} if found else {}), indent=2))
        return 0
    console = Console(highlight=False)
    with console.capture() as printed:
        console.print(plan_table(plan))
        if found:
            console.print()
            console.print(sweep_table(found))
    # Tables fill their lines with blanks, which a diff or an editor would show.
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))
    return 0

"""`megatron-fc plan`: what a run will need and take."""

import argparse
import json
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate a config before it runs: memory, FLOPs, bytes, step time, days, topologies; needs no GPU",
        allow_abbrev=False,
        usage="megatron-fc plan CONFIG.yaml [key=value ...] --nodes N --gpu NAME [--gpus-per-node G]\n"
        "       [--sweep] [--json] [--network-gb-per-second B] [--nvlink-gb-per-second B]\n"
        "       [--compute S] [--memory S] [--network S] [--reserve S]",
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
    shares = plan.add_argument_group("assumed shares of data-sheet peaks, none of them measured")
    for share, of in (("compute", "FLOP/s"), ("memory", "bandwidth"), ("network", "bandwidth"), ("reserve", "memory")):
        shares.add_argument(f"--{share}", type=float, metavar="SHARE", help=of)
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.planning.devices import device
    from megatron_fc.planning.roofline import Assumptions

    gpu = device(args.gpu)
    shares = {name: getattr(args, name) for name in ("compute", "memory", "network", "reserve")}
    assumed = Assumptions(**{name: share for name, share in shares.items() if share is not None})

    from megatron_fc.training import cpu_lane

    cpu_lane.install()
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
    console.print(plan_table(plan))
    if found:
        console.print()
        console.print(sweep_table(found))
    return 0

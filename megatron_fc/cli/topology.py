"""`megatron-fc topology`: a config on a number of nodes."""

import argparse
import json
import sys
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError


def add(commands: Commands) -> None:
    topology = commands.add_parser(
        "topology",
        help="check a config for a number of nodes: layout, batch, steps, GPU-hours; needs no GPU and no data",
        allow_abbrev=False,
        usage="megatron-fc topology CONFIG.yaml [key=value ...] --nodes N --gpus-per-node G [--check-files]\n"
        "       [--check-packages] [--json] [--tokens-per-second-per-gpu T | --mfu SHARE --peak-tflops P]",
    )
    topology.add_argument("config", type=Path, metavar="CONFIG.yaml")
    topology.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. expert_model_parallel_size=4")
    topology.add_argument("--nodes", type=int, required=True, metavar="N")
    topology.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    topology.add_argument("--tokens-per-second-per-gpu", type=float, metavar="T", help="your measurement")
    topology.add_argument("--mfu", type=float, default=0.3, help="assumed share of the peak (default: %(default)s)")
    topology.add_argument(
        "--peak-tflops", type=float, default=989.0, help="per GPU (default: %(default)s, H100 SXM, dense bf16)"
    )
    topology.add_argument(
        "--check-files", action="store_true", help="data, tokenizer and room for checkpoints must be on this machine"
    )
    topology.add_argument(
        "--check-packages", action="store_true", help="this Python will start the run: warn of packages that it lacks"
    )
    topology.add_argument("--json", action="store_true", help="machine-readable")
    topology.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.preflight.torch_names import with_names

    return with_names(lambda: _print(args), is_process=args.is_process)


def _print(args: argparse.Namespace) -> int:
    from megatron_fc.preflight.topology import Throughput, topology

    throughput = Throughput(args.tokens_per_second_per_gpu, args.mfu, args.peak_tflops)
    found = topology(
        args.config,
        args.overrides,
        args.nodes,
        args.gpus_per_node,
        throughput,
        check_files=args.check_files,
        check_packages=args.check_packages,
    )
    print(json.dumps(found.to_dict(), indent=2) if args.json else "\n".join(found.lines()), flush=True)
    if args.check_files and found.disk_space:
        try:
            found.disk_space.check()
        except UserError as error:  # an exception would start the command again, with torch
            print(f"megatron-fc: {error}", file=sys.stderr)
            return 2
    return 0

"""`megatron-fc convert`: OLMoE and OLMo2 to and from Hugging Face."""

import argparse
import math
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError


def add(commands: Commands) -> None:
    convert = commands.add_parser("convert", help="to and from Hugging Face's files", allow_abbrev=False)
    kinds = convert.add_subparsers(dest="conversion", required=True, metavar="CONVERSION")

    to_hf = kinds.add_parser("to-hf", help="a checkpoint for transformers", allow_abbrev=False)
    to_hf.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    _add_config(to_hf)
    to_hf.add_argument(
        "--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for from_pretrained"
    )
    to_hf.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file, 1e9 bytes (default: %(default)s)"
    )
    to_hf.set_defaults(run=run)

    from_hf = kinds.add_parser("from-hf", help="OLMoE or OLMo2 for Megatron", allow_abbrev=False)
    from_hf.add_argument("source", metavar="MODEL", help="folder with safetensors, or a name on the hub")
    _add_config(from_hf)
    from_hf.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    from_hf.set_defaults(run=run)

    check = kinds.add_parser("check", help="logits of a checkpoint and of its export", allow_abbrev=False)
    check.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    check.add_argument("export", type=Path, metavar="MODEL", help="folder that to-hf wrote")
    _add_config(check)
    check.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (default: %(default)s)")
    check.set_defaults(run=run)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    if args.conversion == "to-hf":
        from megatron_fc.convert.to_hf import to_hf

        if not 0 < args.shard_gb < math.inf:
            raise UserError(f"--shard-gb {args.shard_gb:g} is no size of a file: give a number above 0")
        print(to_hf(args.config, args.overrides, args.source, args.target, round(args.shard_gb * 1e9)))
    elif args.conversion == "from-hf":
        from megatron_fc.convert.from_hf import from_hf

        print(from_hf(args.source, args.config, args.overrides, args.target))
    else:
        from megatron_fc.convert.check import check

        print(check(args.config, args.overrides, args.source, args.export, args.tolerance))
    return 0

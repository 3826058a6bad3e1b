"""`megatron-fc traffic`: bytes that a training step moves."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fc.cli.distill import add_teacher, distillation
from megatron_fc.cli.parsing import Commands

if TYPE_CHECKING:
    from megatron_fc.profiling.records import Report


def add(commands: Commands) -> None:
    traffic = commands.add_parser("traffic", help="bytes that a training step moves through memory and network")
    traffic.set_defaults(run=run)
    actions = traffic.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_against(action: argparse.ArgumentParser) -> None:
        help = "report of the same config with another connection, to stand beside"
        action.add_argument("--against", type=Path, action="append", default=[], metavar="REPORT", help=help)

    profile = actions.add_parser(
        "run",
        help="train some steps on all ranks and count in them; writes traffic.json, traffic.md and traffic.html",
        allow_abbrev=False,
        usage="megatron-fc traffic run CONFIG.yaml [key=value ...] [--from-step K] [--steps N] [--out FOLDER]\n"
        "       [--against REPORT ...] [--nsight] [--teacher CHECKPOINTS ...]",
    )
    profile.add_argument("config", type=Path, metavar="CONFIG.yaml")
    profile.add_argument("overrides", nargs="*", metavar="key=value", help="as for train, e.g. connection=residual")
    profile.add_argument(
        "--from-step", type=int, default=3, metavar="K", help="first counted step (default: %(default)s)"
    )
    profile.add_argument("--steps", type=int, default=2, metavar="N", help="counted steps (default: %(default)s)")
    profile.add_argument("--out", type=Path, metavar="FOLDER", help="default: run_dir=..., else runs/CONFIG-traffic")
    add_against(profile)
    add_teacher(profile.add_argument_group("to profile a distillation, as in megatron-fc distill"))
    profile.add_argument("--nsight", action="store_true", help="print the command lines of nsys and ncu, start nothing")
    profile.add_argument("--nvtx", action="store_true", help="mark ranges for nsys and ncu, which start the program")

    merge = actions.add_parser("merge", help="make the report of a run that broke off, of the parts that are there")
    merge.add_argument("folder", type=Path, metavar="FOLDER", help="the --out of the run")
    add_against(merge)

    compare = actions.add_parser("compare", help="table and bars of several reports, the first is the baseline")
    compare.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="folder or traffic.json")
    compare.add_argument("--plot", type=Path, metavar="PNG", help="draw the bars too")

    dram = actions.add_parser("dram", help="DRAM bytes that ncu measured, by module, beside those that were counted")
    dram.add_argument("csv", type=Path, metavar="CSV", help="of one rank, written by ncu --csv --page raw")
    dram.add_argument("part", type=Path, metavar="PART", help="parts/rank-....json of the same rank")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_fc.profiling import files
    from megatron_fc.profiling.counters import nsight
    from megatron_fc.profiling.report import compare, publish

    if args.action == "compare":
        reports = compare.read_comparable(args.reports)
        Console().print(compare.comparison_table(reports), compare.terminal_bars(reports))
        if args.plot is not None:
            print(f"bars: {compare.plot_comparison(reports, args.plot)}")
        return 0
    if args.action == "dram":
        Console().print(nsight.dram_table(nsight.read_dram(args.csv), files.read_part(args.part)))
        return 0
    against = [compare.read_whole(path) for path in args.against]
    if args.action == "merge":
        return _publish(publish.merge(args.folder), args.folder, against)
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("run_dir=")]
    out = args.out or Path(given[-1] if given else f"runs/{args.config.stem}-traffic")
    if args.nsight:
        print("\n".join(nsight.command_lines([word for word in args.command_line if word != "--nsight"], out)))
        return 0
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.profiling.profile import profile

    teachers = [distillation(args)] if args.teacher else []
    report = profile(
        args.config, args.overrides, args.from_step, args.steps, out, args.command_line, args.nvtx, teachers, against
    )
    return 0 if report is None else _publish(report, out, against)


def _publish(report: "Report", out: Path, against: "list[Report]") -> int:
    from megatron_fc.profiling.report.publish import publish

    written = publish(out, report, against)
    for warning in report.warnings():
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"{report.summary()}\n{out}: {', '.join(file.name for file in written)}")
    return 0

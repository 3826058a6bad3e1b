"""`megatron-fc ablate`: variants of a config times seeds, and the table of their differences."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError


def add(commands: Commands) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="train variants of a config with several seeds, and compare them seed by seed",
        allow_abbrev=False,
        usage="megatron-fc ablate SUITE.yaml [key=value ...] [--variants NAME ...] [--seeds N ...] [--baseline NAME]\n"
        "       [--jobs N] [--out FOLDER] [--results FOLDER] [--dry-run | --table]",
    )
    ablate.add_argument("suite", type=Path, metavar="SUITE.yaml")
    ablate.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, as for train")
    ablate.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="these alone")
    ablate.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="these alone")
    ablate.add_argument("--baseline", metavar="NAME", help="in place of the suite's")
    ablate.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, else one)")
    ablate.add_argument("--out", type=Path, metavar="FOLDER", help="of runs (default: runs/ablation/SUITE)")
    ablate.add_argument("--results", type=Path, metavar="FOLDER", help="of records and tables (default: OUT/results)")
    what = ablate.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check all runs and say which are done; start nothing")
    what.add_argument("--table", action="store_true", help="start nothing: take in what has finished, write the tables")
    # What launch/ablate.sh asks, in its dry run too: numbers of the runs that are left, and a file of words for each.
    ablate.add_argument("--left", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    ablate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.ablation.comparison import lacking_baselines
    from megatron_fc.ablation.execute import default_jobs, diverged, execute, left
    from megatron_fc.ablation.planned import plan
    from megatron_fc.ablation.record import read_record
    from megatron_fc.ablation.report import refuse_other_suite, write_report
    from megatron_fc.ablation.suite import read_suite
    from megatron_fc.runs.writable import refuse_unwritable

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give a number from 1 on")
    suite = read_suite(args.suite, args.overrides, args.baseline)
    out = args.out or Path("runs/ablation") / suite.name
    results = args.results or out / "results"
    chosen = suite.chosen(args.variants, args.seeds)
    every = plan(suite, suite.runs, out)
    planned = [one for one in every if one.run in chosen]
    if args.left is not None:
        args.left.mkdir(parents=True, exist_ok=True)
        remaining = left(suite, planned, results, record=not args.dry_run)
        numbered = {suite.runs.index(one.run): one for one in remaining}
        for number, one in numbered.items():
            (args.left / str(number)).write_text("\n".join([str(suite.config), *one.words]) + "\n")
        print(",".join(map(str, numbered)))
        if names := diverged(planned, results):
            count = "1 run counts" if len(names) == 1 else f"{len(names)} runs count"
            print(
                f"{count} as diverged: {' '.join(names)}; to try one again, delete {results}/NAME.json and, in "
                f"{out}/NAME, state and launches",
                file=sys.stderr,
            )
        return 0
    if args.dry_run:
        for one in planned:
            state = "done" if read_record(results, one) else "begun" if one.run_dir.exists() else "new"
            print(f"{one.run.name}  {state}  {shlex.join(one.words)}")
        return 0
    refuse_unwritable(results)
    refuse_other_suite(results, suite)
    failed: list[str] = []
    if args.table:
        left(suite, planned, results)
    else:
        if left(suite, planned, results):
            refuse_unwritable(out)
        jobs = args.jobs or default_jobs()
        failed = execute(suite, planned, results, jobs, lambda text: print(text, flush=True))
    # All that is there, not only what was chosen now.
    records = [record for one in every if (record := read_record(results, one)) is not None]
    if failed and not records:
        return 1
    given = {"--baseline": args.baseline, "--out": args.out, "--results": args.results}
    kept = [str(word) for option in given.items() if option[1] is not None for word in option]
    command = f"megatron-fc ablate {shlex.join([str(args.suite), *args.overrides, *kept])}"
    if not args.table and (lacking := lacking_baselines(suite, records)):
        print(f"no table yet: {lacking}")
        return 1 if failed else 0
    _, text, _ = files = write_report(suite, records, results, command)
    print(f"\n{text.read_text()}\n" + "\n".join(map(str, files)))
    return 1 if failed else 0

"""`megatron-fc evaluate`: checkpoints on tasks of the lm-evaluation-harness."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fc.cli.parsing import Commands

if TYPE_CHECKING:
    from megatron_fc.evaluate.chosen import Evaluation


def add(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate checkpoints on tasks of the lm-evaluation-harness",
        allow_abbrev=False,
        usage="megatron-fc evaluate CHECKPOINTS CONFIG.yaml [key=value ...] --tasks TASK ... [--out FOLDER]\n"
        "       [--every N] [--limit N] [--data FOLDER] [--include FOLDER ...] [--batch-size N]",
    )
    add_source(evaluate, "documents of each task")
    add_tasks(evaluate)
    evaluate.add_argument("--data", type=Path, metavar="FOLDER", help="data of the tasks, by `evaluate fetch`: offline")
    evaluate.set_defaults(run=run)


def add_source(parser: argparse.ArgumentParser, limited: str) -> None:
    """Words of commands that run checkpoints and write results.

    Args:
        parser: of the command.
        limited: what `--limit` counts.
    """
    parser.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run that wrote them")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train; the layout is free")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of results (default: run_dir=..., else runs/RUN-evaluation)"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help="checkpoints at multiples of iteration N (default: the newest)"
    )
    help = "sequences of full length that a replica runs at once (default: the run's micro-batch)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=help)
    parser.add_argument("--limit", type=int, metavar="N", help=f"{limited} (default: all)")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Words of commands that know the harness's tasks."""
    help = "names, or lists such as configs/eval/olmoe.yaml"
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=help)
    parser.add_argument(
        "--include", nargs="+", type=Path, default=[], metavar="FOLDER", help="of tasks in the harness's YAML format"
    )


def out_of(args: argparse.Namespace) -> Path:
    """The folder of results: of a run, whose folder holds that of checkpoints."""
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("run_dir=")]
    if args.out or given:
        return args.out or Path(given[-1])
    source = args.source.resolve()
    names = (folder.name for folder in (source, *source.parents))
    run = next(name for name in names if not re.fullmatch(r"checkpoints|iter_\d+|release", name))
    return Path(f"runs/{run}-evaluation")


def asked_of(args: argparse.Namespace, lines: Callable[[dict[str, Any]], Iterable[str]]) -> "Evaluation":
    """What such a command asks of which checkpoints.

    Args:
        args: its words.
        lines: what is printed of a checkpoint's results.
    """
    from megatron_fc.errors import UserError

    for name in ("every", "limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number from 1 on")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.evaluate.chosen import Evaluation

    def report(results: dict[str, Any]) -> None:
        print(f"{results['connection']}  iteration {results['iteration']}  {results['tokens']:,} tokens")
        for line in lines(results):
            print(f"  {line}", flush=True)

    def idle() -> None:
        print(f"nothing to do: {out} has all of these results")

    out, limits = out_of(args), (args.every, args.limit, args.batch_size)
    return Evaluation(args.config, args.overrides, args.source, out, *limits, report, idle)


def run(args: argparse.Namespace) -> int:
    def lines(results: dict[str, Any]) -> Iterator[str]:
        for name in wanted.tasks:
            found = results["tasks"][name]
            first = found["metric"]
            error = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
            others = [f"{metric} {value:.4f}" for metric, value in found["metrics"].items() if metric != first]
            values = "  ".join([f"{first} {found['value']:.4f}{error}", *others])
            yield f"{name}  {values}  {found['documents']:,} documents"

    asked = asked_of(args, lines)
    quieten_harness()
    from megatron_fc.evaluate.evaluate import evaluate
    from megatron_fc.evaluate.task_list import read_task_list

    wanted = read_task_list(args.tasks, args.include)
    evaluate(asked, wanted, args.data)
    return 0


def quieten_harness() -> None:
    """Keep the harness's hints to writers of tasks and its bars off the terminal."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

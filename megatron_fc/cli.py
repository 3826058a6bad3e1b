"""The command `megatron-fc`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from megatron_fc.traffic.records import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for input that the user can correct."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, extra = _split_at_dashes(words)
    parser = _parser()
    # argparse takes the overrides in one piece only; those behind an option are handed back.
    args, behind = parser.parse_known_args(words)
    if any(word.startswith("-") for word in behind) or (behind and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    if extra and args.command != "train":
        parser.error("only `train` takes Megatron flags after --")
    if behind:
        args.overrides += behind
    args.words = words
    if args.command == "upcycle" and (args.config is None) != args.to_residual:
        parser.error("upcycle needs CONFIG.yaml, and with --to-residual takes none")
    try:
        return _run(args, extra)
    except UserError as error:
        print(f"megatron-fc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fc", description="Frac-Connections (arXiv 2503.14125) for Megatron-LM.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a YAML config inside Megatron's training loop",
        allow_abbrev=False,
        usage="megatron-fc train CONFIG.yaml [key=value ...] [--dry-run] [--brief] [-- Megatron flags ...]",
    )
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. connection=residual optimizer.lr=1e-3")
    train.add_argument("--dry-run", action="store_true", help="check and print Megatron's command line, start nothing")

    train.add_argument("--brief", action="store_true", help="progress only: no notes before, no table after")

    preflight = commands.add_parser(
        "preflight",
        help="check nodes, network, clocks, files and room for a run, on all its ranks",
        allow_abbrev=False,
    )
    preflight.add_argument("config", type=Path, metavar="CONFIG.yaml")
    preflight.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")

    topology = commands.add_parser(
        "topology",
        help="check a config for a number of nodes: layout, batch, steps, GPU-hours; needs no GPU and no data",
        allow_abbrev=False,
        usage="megatron-fc topology CONFIG.yaml [key=value ...] --nodes N --gpus-per-node G [--check-files]\n"
        "       [--json] [--tokens-per-second-per-gpu T | --mfu SHARE --peak-tflops P]",
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
    topology.add_argument("--check-files", action="store_true", help="data and tokenizer must be on this machine")
    topology.add_argument("--json", action="store_true", help="machine-readable")

    plan = commands.add_parser(
        "plan",
        help="estimate a config before it runs: memory, FLOPs, bytes, step time, days, topologies; needs no GPU",
        allow_abbrev=False,
        usage="megatron-fc plan CONFIG.yaml [key=value ...] --nodes N --gpu NAME [--gpus-per-node G]\n"
        "       [--sweep] [--json] [--network-gb-per-second B] [--compute S] [--memory S] [--network S] [--reserve S]",
    )
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. tensor_model_parallel_size=2")
    plan.add_argument("--nodes", type=int, required=True, metavar="N")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="a100, h100, h200, b200 or gb200")
    plan.add_argument("--gpus-per-node", type=int, metavar="G", help="default: of the GPU's usual machine")
    plan.add_argument("--network-gb-per-second", type=float, metavar="B", help="per GPU; default: of its usual machine")
    plan.add_argument("--sweep", action="store_true", help="rank other topologies by estimated speed")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    shares = plan.add_argument_group("assumed shares of data-sheet peaks, none of them measured")
    for share, of in (("compute", "FLOP/s"), ("memory", "bandwidth"), ("network", "bandwidth"), ("reserve", "memory")):
        shares.add_argument(f"--{share}", type=float, metavar="SHARE", help=of)

    upcycle = commands.add_parser(
        "upcycle",
        help="give a plain checkpoint Frac-Connections, or take untrained ones away",
        allow_abbrev=False,
        usage="megatron-fc upcycle --from PLAIN --to FC CONFIG.yaml [key=value ...]\n"
        "       megatron-fc upcycle --to-residual --from FC --to PLAIN",
    )
    upcycle.add_argument("--from", type=Path, required=True, dest="source", metavar="FOLDER", help="of checkpoints")
    upcycle.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    upcycle.add_argument("--to-residual", action="store_true", help="the reverse, where nothing was trained yet")
    upcycle.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="the model, with connections")
    upcycle.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. connection=sfc rate=2")

    data = commands.add_parser("data", help="make training data")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    demo_data = kinds.add_parser("demo", help="real text from this machine, tokenized, in Megatron's format")
    demo_data.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (default: %(default)s)")
    demo_data.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")

    demo = commands.add_parser("demo", help="train a residual and a Frac-Connections MoE and compare them")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    demo.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder (default: %(default)s)")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="for both runs, e.g. train_iters=400")

    compare = commands.add_parser("compare", help="table and curves of finished runs, the first is the baseline")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    compare.add_argument("--plot", type=Path, help="write the training curves to this PNG")

    runs = commands.add_parser("runs", help="where runs stand: progress, restarts and why, checkpoints, losses")
    runs.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER", help="default: runs")
    runs.add_argument("--json", action="store_true", help="machine-readable")

    _add_traffic(commands)

    doctor = commands.add_parser("doctor", help="what is installed, what it enables, which backend will run")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _add_traffic(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    traffic = commands.add_parser("traffic", help="bytes that a training step moves through memory and network")
    actions = traffic.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_against(action: argparse.ArgumentParser) -> None:
        help = "report of the same config with another connection, to stand beside"
        action.add_argument("--against", type=Path, action="append", default=[], metavar="REPORT", help=help)

    run = actions.add_parser(
        "run",
        help="train some steps on all ranks and count in them; writes traffic.json, traffic.md and traffic.html",
        allow_abbrev=False,
        usage="megatron-fc traffic run CONFIG.yaml [key=value ...] [--from-step K] [--steps N] [--out FOLDER]\n"
        "       [--against REPORT ...] [--nsight]",
    )
    run.add_argument("config", type=Path, metavar="CONFIG.yaml")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="as for train, e.g. connection=residual")
    run.add_argument("--from-step", type=int, default=3, metavar="K", help="first counted step (default: %(default)s)")
    run.add_argument("--steps", type=int, default=2, metavar="N", help="counted steps (default: %(default)s)")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="default: run_dir=..., else runs/CONFIG-traffic")
    add_against(run)
    run.add_argument("--nsight", action="store_true", help="print the command lines of nsys and ncu, start nothing")
    run.add_argument("--nvtx", action="store_true", help="mark ranges for nsys and ncu, which start the program")

    merge = actions.add_parser("merge", help="make the report of a run that broke off, of the parts that are there")
    merge.add_argument("folder", type=Path, metavar="FOLDER", help="the --out of the run")
    add_against(merge)

    compare = actions.add_parser("compare", help="table and bars of several reports, the first is the baseline")
    compare.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="folder or traffic.json")
    compare.add_argument("--plot", type=Path, metavar="PNG", help="draw the bars too")

    dram = actions.add_parser("dram", help="DRAM bytes that ncu measured, by module, beside those that were counted")
    dram.add_argument("csv", type=Path, metavar="CSV", help="of one rank, written by ncu --csv --page raw")
    dram.add_argument("part", type=Path, metavar="PART", help="parts/rank-....json of the same rank")


def _run(args: argparse.Namespace, extra: list[str]) -> int:
    if args.command == "doctor":
        from megatron_fc import doctor

        return doctor.main(json=args.json)
    if args.command == "runs":
        from megatron_fc.report import runs_table

        return runs_table.main(args.folders, args.json)
    if args.command == "compare":
        return _compare(args.runs, args.plot)
    if args.command == "data":
        from megatron_fc.data import build_demo_data

        _quieten()
        data = build_demo_data(args.out, vocab_size=args.vocab_size, report=print)
        print(f"train with: train_data_path={data.train_prefix} tokenizer_model={data.tokenizer}")
        return 0
    _quieten()
    if args.command == "traffic":
        return _traffic(args)
    if args.command == "demo":
        from megatron_fc.demo import run_demo

        return run_demo(args.out, args.data, args.overrides)
    if args.command == "upcycle":
        return _upcycle(args)
    if args.command == "preflight":
        return _preflight(args)
    if args.command == "topology":
        return _topology(args)
    if args.command == "plan":
        return _plan(args)
    return _train(args, extra)


def _train(args: argparse.Namespace, extra: list[str]) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides, extra)
    if args.dry_run:
        for note in recipe.notes:
            print(f"# {note}")
        print(_as_command(recipe.argv))
        return 0

    from megatron_fc.megatron.pretrain import train
    from megatron_fc.report.runlog import is_log_rank
    from megatron_fc.report.summary import comparison_table, write_summary

    if is_log_rank() and not args.brief:
        for note in recipe.notes:
            print(f"note: {note}", flush=True)
    trained = train(recipe)
    if is_log_rank():
        facts = {
            "connection": recipe.connection,
            "family": recipe.family,
            "parameters": trained.parameters.total,
            "frac_parameters": trained.parameters.frac,
            "tokens_per_iteration": trained.tokens_per_iteration,
            "peak_memory_bytes": trained.peak_memory_bytes,
            "seconds": round(trained.seconds, 1),
            "world_size": trained.world_size,
            "backend": recipe.backend,
            "config": recipe.sections,
            "megatron_arguments": recipe.argv,
        }
        summary = write_summary(recipe.run_dir, facts)
        if not args.brief:
            from rich.console import Console

            Console().print(comparison_table([summary]))
            print(f"{recipe.run_dir}: summary.json, tensorboard, logs")
    return 0


def _traffic(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_fc.traffic import compare, files, nsight, publish

    if args.action == "compare":
        reports = compare.read_comparable(args.reports)
        Console().print(compare.comparison_table(reports), compare.terminal_bars(reports))
        if args.plot is not None:
            print(f"bars: {compare.plot_comparison(reports, args.plot)}")
        return 0
    if args.action == "dram":
        Console().print(nsight.dram_table(nsight.read_dram(args.csv), files.read_part(args.part)))
        return 0
    against = [files.read_report(path) for path in args.against]
    if args.action == "merge":
        return _publish_traffic(publish.merge(args.folder), args.folder, against)
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("run_dir=")]
    out = args.out or Path(given[-1] if given else f"runs/{args.config.stem}-traffic")
    if args.nsight:
        print("\n".join(nsight.command_lines([word for word in args.words if word != "--nsight"], out)))
        return 0
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.traffic import profile

    report = profile(args.config, args.overrides, args.from_step, args.steps, out, args.words, args.nvtx)
    return 0 if report is None else _publish_traffic(report, out, against)


def _publish_traffic(report: "Report", out: Path, against: "list[Report]") -> int:
    from megatron_fc.traffic.publish import publish

    written = publish(out, report, against)
    for warning in report.warnings():
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"{report.summary()}\n{out}: {', '.join(file.name for file in written)}")
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from megatron_fc.preflight import NodeError, Plan, preflight

    def make_plan() -> Plan:
        from megatron_fc.megatron import cpu

        cpu.install()
        from megatron_fc.megatron.preflight import plan_of
        from megatron_fc.megatron.recipe import load_recipe

        return plan_of(load_recipe(args.config, args.overrides))

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        found = preflight(make_plan)
    except NodeError as error:
        if speaks or not error.seen_by_all:
            print(f"megatron-fc: preflight: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except UserError:
        if speaks:
            raise
        return 2
    if speaks:
        print(f"preflight: {found}")
    return 0


def _topology(args: argparse.Namespace) -> int:
    import json

    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.topology import Throughput, topology

    throughput = Throughput(args.tokens_per_second_per_gpu, args.mfu, args.peak_tflops)
    found = topology(
        args.config, args.overrides, args.nodes, args.gpus_per_node, throughput, check_files=args.check_files
    )
    print(json.dumps(found.to_dict(), indent=2) if args.json else "\n".join(found.lines()))
    return 0


def _plan(args: argparse.Namespace) -> int:
    import json

    from megatron_fc.planning.devices import device
    from megatron_fc.planning.roofline import Assumptions

    gpu = device(args.gpu)
    shares = {name: getattr(args, name) for name in ("compute", "memory", "network", "reserve")}
    assumed = Assumptions(**{name: share for name, share in shares.items() if share is not None})

    from megatron_fc.megatron import cpu

    cpu.install()
    from rich.console import Console

    from megatron_fc.megatron.planning import plan_of
    from megatron_fc.planning.sweep import sweep
    from megatron_fc.planning.table import plan_table, sweep_table

    plan = plan_of(
        args.config, args.overrides, args.nodes, gpu, args.gpus_per_node, args.network_gb_per_second, assumed
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


def _upcycle(args: argparse.Namespace) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.conversion import residual_checkpoint, upcycle_checkpoint
    from megatron_fc.megatron.recipe import load_recipe
    from megatron_fc.report.runlog import is_log_rank

    if args.to_residual:
        said = residual_checkpoint(args.source, args.target)
    else:
        said = upcycle_checkpoint(load_recipe(args.config, args.overrides), args.source, args.target)
    if is_log_rank():
        print(said)
    return 0


def _compare(run_dirs: list[Path], png: Path | None) -> int:
    from rich.console import Console

    from megatron_fc.report.plot import plot_losses
    from megatron_fc.report.summary import comparison_table, read_summary

    summaries = []
    for run_dir in run_dirs:
        summary = read_summary(run_dir)
        if summary is None:
            raise UserError(f"{run_dir} has no summary.json: give the folder of a run that has finished")
        summaries.append(summary)
    Console().print(comparison_table(summaries))
    if png is not None:
        labels = [summary["connection"] for summary in summaries]
        print(f"curves: {plot_losses(list(zip(labels, run_dirs, strict=True)), png)}")
    return 0


def _as_command(argv: list[str]) -> str:
    """One flag per line, quoted for a shell."""
    import shlex

    lines = ["pretrain_gpt.py"]
    for word in argv:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


def _quieten() -> None:
    """Keep import-time warnings off the terminal: that Apex or TE is missing is said once, by our own notes."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b")
    for talkative in ("torch.utils.cpp_extension", "matplotlib"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())

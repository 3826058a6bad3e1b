"""The command `megatron-fc`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from megatron_fc.megatron.compress.distill import Distillation
    from megatron_fc.megatron.recipe import Recipe


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

    _add_quantize(commands)
    _add_distill(commands)
    _add_prune(commands)

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

    doctor = commands.add_parser("doctor", help="what is installed, what it enables, which backend will run")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _add_quantize(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="quantise a trained checkpoint with ModelOpt, calibrated on the run's validation data",
        allow_abbrev=False,
        usage="megatron-fc quantize CHECKPOINTS CONFIG.yaml [key=value ...] --recipe RECIPE --to FOLDER\n"
        "       [--calibration-iters N]",
    )
    quantize.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    quantize.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run that wrote them")
    quantize.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    quantize.add_argument("--recipe", required=True, choices=("fp8", "int8", "int4_awq", "nvfp4"))
    quantize.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    quantize.add_argument(
        "--calibration-iters", type=int, default=16, metavar="N", help="validation iterations (default: %(default)s)"
    )


def _add_distill(commands: Any) -> None:
    distill = commands.add_parser(
        "distill",
        help="train a student on a teacher's distribution over the next token, with ModelOpt",
        allow_abbrev=False,
        usage="megatron-fc distill CONFIG.yaml [key=value ...] --teacher CHECKPOINTS [--teacher-config TEACHER.yaml]\n"
        "       [--temperature T] [--lm-loss-weight W]",
    )
    distill.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the student's run")
    distill.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    distill.add_argument("--teacher", type=Path, required=True, metavar="CHECKPOINTS", help="with or without FC")
    distill.add_argument("--teacher-config", type=Path, metavar="TEACHER.yaml", help="where it is no CONFIG.yaml model")
    distill.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    distill.add_argument(
        "--lm-loss-weight", type=float, default=0.0, metavar="W", help="of the next-token loss (default: %(default)s)"
    )


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser(
        "prune",
        help="make a smaller model of a trained checkpoint: layers, heads, experts, FFN width",
        allow_abbrev=False,
        usage="megatron-fc prune CHECKPOINTS CONFIG.yaml [key=value ...] --export NAME=SIZE ... --to FOLDER\n"
        "       [--calibration-iters N]",
    )
    prune.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    prune.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run that wrote them")
    prune.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    prune.add_argument("--export", nargs="+", required=True, metavar="NAME=SIZE", help="e.g. num_experts=32")
    prune.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    prune.add_argument(
        "--calibration-iters", type=int, default=16, metavar="N", help="validation iterations (default: %(default)s)"
    )


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
    if args.command == "demo":
        from megatron_fc.demo import run_demo

        return run_demo(args.out, args.data, args.overrides)
    if args.command == "upcycle":
        return _upcycle(args)
    if args.command == "distill":
        return _distill(args)
    if args.command == "prune":
        return _prune(args)
    if args.command == "quantize":
        return _quantize(args)
    if args.command == "preflight":
        return _preflight(args)
    if args.command == "topology":
        return _topology(args)
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
    return _train_recipe(recipe, args.brief)


def _train_recipe(recipe: "Recipe", brief: bool = False, distillation: "Distillation | None" = None) -> int:
    from megatron_fc.megatron.pretrain import train
    from megatron_fc.report.runlog import is_log_rank
    from megatron_fc.report.summary import comparison_table, write_summary

    if is_log_rank() and not brief:
        for note in recipe.notes:
            print(f"note: {note}", flush=True)
    trained = train(recipe, distillation)
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
        if not brief:
            from rich.console import Console

            Console().print(comparison_table([summary]))
            print(f"{recipe.run_dir}: summary.json, tensorboard, logs")
    return 0


def _distill(args: argparse.Namespace) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.compress.distill import Distillation, teacher_recipe
    from megatron_fc.megatron.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    teacher = teacher_recipe(args.config, args.overrides, args.teacher_config, args.teacher)
    return _train_recipe(
        recipe, distillation=Distillation(teacher, args.teacher, args.temperature, args.lm_loss_weight)
    )


def _preflight(args: argparse.Namespace) -> int:
    from megatron_fc.preflight import NodeError, Plan, preflight

    def make_plan() -> Plan:
        from megatron_fc.megatron import cpu

        cpu.install()
        from megatron_fc.megatron.plan import plan_of
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


def _quantize(args: argparse.Namespace) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.compress.quantize import quantize
    from megatron_fc.megatron.recipe import load_recipe
    from megatron_fc.report.losses import print_losses
    from megatron_fc.report.runlog import is_log_rank

    recipe = load_recipe(args.config, args.overrides)
    done = quantize(recipe, args.source, args.target, args.recipe, args.calibration_iters)
    if is_log_rank():
        print_losses({"original": done.original_loss, args.recipe: done.loss})
        print(f"{done.quantizers} quantizers: written to {args.target}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.compress.prune import prune
    from megatron_fc.report.losses import print_losses
    from megatron_fc.report.runlog import is_log_rank

    done = prune(args.config, args.overrides, args.export, args.source, args.target, args.calibration_iters)
    if is_log_rank():
        print_losses({"original": done.original_loss, "pruned": done.loss})
        print(f"written to {args.target}, train it with: load={args.target} finetune=true {' '.join(done.settings)}")
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

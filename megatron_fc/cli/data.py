"""`megatron-fc data`: training data."""

import argparse
import os
import sys
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="make training data, and look at them")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_tokenize(kinds)
    status = kinds.add_parser("status", help="how far `data tokenize` is in a folder")
    status.add_argument("folder", type=Path, metavar="FOLDER")
    status.set_defaults(run=run_status)
    verify = kinds.add_parser("verify", help="compare data with their manifest, every byte and token")
    verify.add_argument("folder", type=Path, metavar="FOLDER")
    verify.add_argument("--sources", action="store_true", help="the texts that they were made of, too")
    verify.set_defaults(run=run_verify)
    merge = kinds.add_parser("merge", help="join the files of all tasks")
    merge.add_argument("folder", type=Path, metavar="FOLDER")
    merge.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new")
    merge.set_defaults(run=run_merge)
    _add_blend(kinds)
    _add_look(kinds)
    index = kinds.add_parser("index", help="make the order of a run's samples before its ranks start")
    index.add_argument("config", type=Path, metavar="CONFIG.yaml")
    index.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    index.set_defaults(run=run_index)
    demo_data = kinds.add_parser("demo", help="real text from this machine, tokenized, in Megatron's format")
    demo_data.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (default: %(default)s)")
    demo_data.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    demo_data.set_defaults(run=run_demo)


def _add_tokenize(kinds: Commands) -> None:
    parser = kinds.add_parser("tokenize", help="text to Megatron's format; the same command goes on where it was ended")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, patterns: jsonl, parquet, txt")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or of the same command before")
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="a folder, or a name on the hub")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column (default: %(default)s)")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--eos", metavar="TOKEN", help="ends a document (default: the tokenizer's)")
    end.add_argument("--no-eos", action="store_true", help="write documents without an end")
    parser.add_argument("--tasks", type=int, metavar="N", help="parts of the work (default: one per file, up to 100)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="tasks at once (default: one per core; with SLURM, as it likes)"
    )
    parser.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE", help="documents for validation (default: none)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=32 << 20, metavar="N", help="of a line or row (default: %(default)s)"
    )
    filters = parser.add_argument_group("OLMoE's filters, none by default")
    filters.add_argument("--drop-repetitions", action="store_true", help="1 to 13 tokens 32 times or more in a row")
    filters.add_argument("--min-stars", type=int, default=0, metavar="N", help="of a repository; OLMoE: 2")
    filters.add_argument("--stars-field", default="max_stars_count", metavar="NAME", help="(default: %(default)s)")
    filters.add_argument("--max-word", type=float, default=1.0, metavar="SHARE", help="most frequent word; OLMoE: 0.3")
    filters.add_argument("--max-two-words", type=float, default=1.0, metavar="SHARE", help="both together; OLMoE: 0.5")
    cluster = parser.add_argument_group("SLURM, through launch/tokenize.sh")
    cluster.add_argument("--executor", choices=("local", "slurm"), default="local")
    cluster.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="option of sbatch")
    cluster.add_argument("--srun", action="append", default=[], metavar="OPTION", help="option of srun")
    cluster.add_argument("--python", default=sys.executable, metavar="FILE", help="of the nodes")
    parser.set_defaults(run=run_tokenize)


def _add_blend(kinds: Commands) -> None:
    parser = kinds.add_parser("blend", help="data sets and their shares, for per_split_data_args_path")
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="or its folder; NAME=FOLDER with --mix")
    shares = parser.add_mutually_exclusive_group(required=True)
    shares.add_argument("--weights", type=float, nargs="+", metavar="SHARE", help="of the tokens that a run reads")
    shares.add_argument("--natural", action="store_true", help="each data set as large as it is")
    shares.add_argument(
        "--mix", type=Path, metavar="FILE.yaml", help="sizes as published, e.g. configs/data/olmoe_mix.yaml"
    )
    parser.add_argument("--tokens", metavar="N", help="that a run reads, e.g. 3T (default: as many as the data have)")
    parser.add_argument(
        "--max-epochs", type=float, default=4.0, metavar="N", help="that a data set may be read (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.set_defaults(run=run_blend)


def _add_look(kinds: Commands) -> None:
    parser = kinds.add_parser("look", help="a document, or what a rank is fed, as text")
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="of .bin and .idx")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="from 0 on")
    what.add_argument("--sample", type=int, default=0, metavar="N", help="in the shuffled order (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="(default: tokenizer, beside the files)")
    parser.add_argument("--seq-length", type=int, default=4096, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--eod-mask-loss", action="store_true", help="as in a config")
    parser.add_argument("--reset-position-ids", action="store_true", help="as in a config")
    parser.set_defaults(run=run_look)


def run_tokenize(args: argparse.Namespace) -> int:
    from megatron_fc.data.filters import Filters
    from megatron_fc.data.tokenize import Local, Slurm, tokenize

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers={args.workers}: give 1 or more")
    where: Local | Slurm = Local(args.workers or len(os.sched_getaffinity(0)))
    if args.executor == "slurm":
        sbatch = dict(word.partition("=")[::2] for word in args.sbatch)
        if "time" not in sbatch:
            raise UserError("--sbatch has no time=HH:MM:SS: give the time limit of a job of the array")
        where = Slurm(args.workers or -1, sbatch, args.srun, args.python)
    elif args.sbatch or args.srun:
        raise UserError("--sbatch and --srun are for --executor slurm: give it, or leave them out")
    tokenize(
        args.inputs,
        args.out,
        args.tokenizer,
        where=where,
        tasks=args.tasks,
        eos=args.eos,
        text_field=args.text_field,
        append_eos=not args.no_eos,
        validation=args.validation,
        max_bytes=args.max_bytes,
        filters=Filters(args.drop_repetitions, args.min_stars, args.stars_field, args.max_word, args.max_two_words),
        report=lambda line: print(line, flush=True),
    )
    return 0


def run_status(args: argparse.Namespace) -> int:
    from megatron_fc.data.status import status

    print("\n".join(status(args.folder)))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from megatron_fc.data.verify import verify

    verify(args.folder, sources=args.sources, report=print)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    from megatron_fc.data.merge import merge

    merge(args.folder, args.target, report=print)
    return 0


def run_blend(args: argparse.Namespace) -> int:
    from megatron_fc.data.blend import blend, count

    tokens = None if args.tokens is None else count(args.tokens)
    blend(
        args.manifests,
        args.out,
        weights=args.weights,
        mix=args.mix,
        tokens=tokens,
        max_epochs=args.max_epochs,
        report=print,
    )
    return 0


def run_look(args: argparse.Namespace) -> int:
    from megatron_fc.data.look import look_at_document, look_at_sample
    from megatron_fc.training.hub_tokenizer import load_tokenizer

    if args.prefix.is_dir():
        raise UserError(
            f"{args.prefix} is a folder: give a file's path without its ending, e.g. {args.prefix}/train-00000"
        )
    folder = args.tokenizer or args.prefix.parent / "tokenizer"
    tokenizer = load_tokenizer(folder, f"the tokenizer {folder}")
    if args.document is not None:
        lines = look_at_document(args.prefix, args.document, tokenizer)
    else:
        lines = look_at_sample(
            args.prefix,
            args.sample,
            tokenizer,
            sequence_length=args.seq_length,
            seed=args.seed,
            eod_mask_loss=args.eod_mask_loss,
            reset_position_ids=args.reset_position_ids,
        )
    print("\n".join(lines))
    return 0


def run_index(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.data.index import index

    index(args.config, args.overrides, report=print)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from megatron_fc.data import build_demo_data

    data = build_demo_data(args.out, vocab_size=args.vocab_size, report=print)
    print(f"train with: train_data_path={data.train_prefix} tokenizer_model={data.tokenizer}")
    return 0

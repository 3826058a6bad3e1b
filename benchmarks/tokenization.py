#!/usr/bin/env python3
"""Tokens per second of `megatron-fc data tokenize` beside Megatron-LM's recipe, datatrove, and `tokenizers` alone.

All read the same lines of real text, what is installed beside this Python, in one run: each contestant with each number
of workers in a process of its own, by turns. Megatron-LM's wheel lacks tools/preprocess_data.py, so its steps are made
of megatron-core's classes: a pool parses and tokenizes line by line, one process writes. `tokenizers` alone has the
texts in memory and writes nothing: the limit. A worker tokenizes with one thread. At the end, a profile of one of our
tasks says what is left beside the tokenizer.

    python benchmarks/tokenization.py --megabytes 200 --workers 1 2
"""

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import batched
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_fc.data import corpus, tokenizer

CONTESTANTS = ("limit", "ours", "megatron", "datatrove")
PROFILED = 12  # functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of text, as far as there is (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--contestant", nargs=3, metavar=("NAME", "WORKERS", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        name, workers, folder = args.contestant
        run(name, int(workers), Path(folder))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size, documents = write_text(folder, args.megabytes * 10**6, args.vocabulary)
        print(
            f"{documents:,} documents, {size:,} bytes of text, {args.vocabulary:,} tokens in the vocabulary", flush=True
        )
        for _ in range(args.rounds):
            for workers in args.workers:
                for name in args.only:
                    words = [sys.executable, __file__, "--contestant", name, str(workers), str(folder)]
                    done = subprocess.run(words, capture_output=True, text=True, check=False)
                    if done.returncode:
                        print(f"{name:10} {workers} workers: {done.stderr[-500:]}", flush=True)
                    else:
                        print(f"{name:10} {workers} workers: {done.stdout.splitlines()[-1]}", flush=True)
        if "ours" in args.only:
            print_profile(folder)


def write_text(folder: Path, wanted: int, vocabulary: int) -> tuple[int, int]:
    """Write what is installed as JSON lines, in four files, and a tokenizer; returns bytes and documents."""
    roots = [*corpus.installed_roots(), corpus.Root("packages", Path(sysconfig.get_path("purelib")))]
    documents = sorted(corpus.collect(roots), key=lambda document: document.name)
    tokenizer.save(
        tokenizer.train((d.text for d in corpus.sample(documents, 8_000_000)), vocabulary), folder / "tokenizer"
    )
    (folder / "text").mkdir()
    size = count = 0
    parts = [(folder / "text" / f"{part}.jsonl").open("wb") for part in range(4)]
    for document in documents:
        if size >= wanted:
            break
        parts[count % 4].write(json.dumps({"text": document.text}).encode() + b"\n")
        size, count = size + len(document.text.encode()), count + 1
    for part in parts:
        part.close()
    return size, count


def run(name: str, workers: int, folder: Path) -> None:
    """Run one contestant and print its speed and memory."""
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    if name == "limit":
        tokens, seconds = limit(workers, folder, out)
    else:
        tokens = {"ours": ours, "megatron": megatron, "datatrove": datatrove}[name](workers, folder, out)
        seconds = time.monotonic() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{tokens / seconds:12,.0f} tokens/s  {tokens:,} tokens  {seconds:.1f} s  at most {peak / 1024:,.0f} MiB")


def ours(workers: int, folder: Path, out: Path) -> int:
    words = [sys.executable, "-m", "megatron_fc", "data", "tokenize", str(folder / "text"), "--out", str(out)]
    words += ["--tokenizer", str(folder / "tokenizer"), "--workers", str(workers)]
    subprocess.run(words, check=True, capture_output=True)
    return int(json.loads((out / "manifest.json").read_text())["tokens"])


def print_profile(folder: Path) -> None:
    """Run the first task of the job once more, in this process, and print where its time goes."""
    from megatron_fc.data.task import TokenizeTask

    profile = cProfile.Profile()
    profile.runcall(TokenizeTask(folder / "ours").run)
    stats = pstats.Stats(profile)
    functions = sorted(stats.stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]
    print(f"profile of one task, {stats.total_tt:.1f} s:")  # type: ignore[attr-defined]
    for (file, _, name), (_, calls, own, _, _) in functions[:PROFILED]:
        print(f"{own / stats.total_tt:7.1%} {calls:10,} calls  {Path(file).name} {name}")  # type: ignore[attr-defined]


def megatron(workers: int, folder: Path, out: Path) -> int:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    out.mkdir()
    reader = _Encoder(folder / "tokenizer")
    reader.initialize()
    builder = IndexedDatasetBuilder(str(out / "data.bin"), dtype=DType.optimal_dtype(reader.tokenizer.vocab_size))
    tokens = 0
    with multiprocessing.Pool(workers, initializer=reader.initialize) as pool:
        for path in sorted((folder / "text").iterdir()):
            with path.open(encoding="utf-8") as lines:
                for ids in pool.imap(reader.encode, lines, 32):
                    builder.add_document(ids, [len(ids)])
                    tokens += len(ids)
    builder.finalize(str(out / "data.idx"))
    return tokens


class _Encoder:
    """What a worker of Megatron-LM's recipe does with a line."""

    tokenizer: Any

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def initialize(self) -> None:
        from megatron.core.tokenizers import MegatronTokenizer

        _Encoder.tokenizer = MegatronTokenizer.from_pretrained(self._folder, metadata_path={"library": "huggingface"})

    def encode(self, line: str) -> list[int]:
        ids: list[int] = _Encoder.tokenizer.tokenize(json.loads(line)["text"])
        return [*ids, _Encoder.tokenizer.eod]


def datatrove(workers: int, folder: Path, out: Path) -> int:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    writer = MegatronDocumentTokenizer(str(out), None, str(folder / "tokenizer" / "tokenizer.json"), tokenizer.EOD)
    pipeline = [JsonlReader(str(folder / "text")), writer]
    LocalPipelineExecutor(pipeline, tasks=4, workers=workers, logging_dir=str(out / "logs")).run()
    return sum(path.stat().st_size for path in out.glob("*.bin")) // 2


def limit(workers: int, folder: Path, out: Path) -> tuple[int, float]:
    """The tokens, and the seconds that encoding took, divided among the workers."""
    parts = [(folder, path) for path in sorted((folder / "text").iterdir())]
    with multiprocessing.Pool(workers) as pool:
        done = list(pool.imap_unordered(_limit, parts))
    return sum(tokens for tokens, _ in done), sum(seconds for _, seconds in done) / workers


def _limit(parts: tuple[Path, Path]) -> tuple[int, float]:
    folder, path = parts
    encoder = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    encoder.encode_special_tokens = True  # as ours
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    tokens, began = 0, time.monotonic()
    for batch in batched(texts, 100):
        encodings = encoder.encode_batch_fast(list(batch), add_special_tokens=False)
        tokens += sum(len(encoding) + 1 for encoding in encodings)
    return tokens, time.monotonic() - began


if __name__ == "__main__":
    main()

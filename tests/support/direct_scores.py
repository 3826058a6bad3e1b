"""Scores of the local tasks without the harness and without `megatron_fc.evaluate`, as JSON on standard output.

python direct_scores.py CONFIG CHECKPOINTS TASKS [key=value ...]
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_fc.training import cpu_lane

cpu_lane.install()

from megatron.core.utils import unwrap_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from megatron_fc.checkpoints.location import find_checkpoint  # noqa: E402
from megatron_fc.training.loaded import load_model  # noqa: E402
from megatron_fc.training.recipe import load_recipe  # noqa: E402
from megatron_fc.training.setup import silence  # noqa: E402


def logprob(model: Any, tokens: list[int], scored: int) -> float:
    """Of the last tokens."""
    read, length = torch.tensor([tokens[:-1]]), len(tokens) - 1
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(read, torch.arange(length)[None], mask)[0].double()
    logits = logits - logits.logsumexp(-1, keepdim=True)
    return float(sum(logits[place, tokens[place + 1]] for place in range(length - scored, length)))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def main(config: Path, checkpoints: Path, folder: Path, *overrides: str) -> None:
    recipe = load_recipe(config, overrides)
    tokenizer = AutoTokenizer.from_pretrained(recipe.sections["data"]["tokenizer_model"])
    with silence():
        args, chunks, _ = load_model(recipe, find_checkpoint(checkpoints))
        model = unwrap_model(chunks)[0].eval()
        found = scores(model, tokenizer, folder, args.seq_length)
    print(json.dumps(found))


def scores(model: Any, tokenizer: Any, folder: Path, longest: int) -> dict[str, Any]:
    correct = {"acc": 0, "acc_norm": 0}
    cloze, every = 0.0, []
    questions = rows(folder, "questions.jsonl")
    for row in questions:
        of_choice = {}
        for choice in (row["good"], row["bad"]):
            context, whole = tokenizer(row["question"]).input_ids, tokenizer(row["question"] + choice).input_ids
            of_choice[choice] = logprob(model, whole[-(longest + 1) :], len(whole) - len(context))
        every += of_choice.values()
        cloze += of_choice[row["good"]] / len(questions)
        right = (row["good"], row["bad"])[row["label"]]
        correct["acc"] += max(of_choice, key=lambda choice: of_choice[choice]) == right
        correct["acc_norm"] += max(of_choice, key=lambda choice: of_choice[choice] / len(choice)) == right
    bits = size = 0.0
    for row in rows(folder, "texts.jsonl"):
        tokens = tokenizer(row["text"]).input_ids
        text = [tokenizer.bos_token_id or tokenizer.eos_token_id, *tokens]
        for start in range(1, len(text), longest):  # a token is predicted once, behind as many as the model can read
            end = min(start + longest, len(text))
            bits -= logprob(model, text[max(0, end - longest - 1) : end], end - start) / math.log(2)
        size += len(row["text"].encode())
    row_of_all: list[int] = []
    for row in rows(folder, "texts.jsonl"):
        row_of_all += [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
    chunks = [row_of_all[at : at + longest] for at in range(0, len(row_of_all) - longest + 1, longest)]
    loss = -sum(logprob(model, chunk, longest - 1) for chunk in chunks) / len(chunks) / (longest - 1)
    accuracies = {name: count / len(questions) for name, count in correct.items()}
    found = {"local_choice": accuracies, "local_cloze": cloze, "local_text": bits / size, "scores": every}
    return found | {"chunk_loss": loss, "chunk_tokens": len(chunks) * (longest - 1)}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])

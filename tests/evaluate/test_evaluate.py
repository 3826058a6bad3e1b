"""`megatron-fc evaluate` on tasks from local files: the same answers from every layout, and by hand; every refusal."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc.data.indexed import write_indexed
from support import fork_server
from support import training_runs as runs
from support.compress_commands import Done, run
from support.damage import corrupt
from support.evaluations import Trials, answers, evaluate, write_tasks

# fp32 in another order of sums.
CLOSE = 1e-4
TP2 = ["tensor_model_parallel_size=2", "sequence_parallel=true"]
LAYOUTS = {
    "tp2": TP2,
    "pp2": ["pipeline_model_parallel_size=2"],
    "ep2": ["expert_model_parallel_size=2"],
    "dp2": [],
    "tp2_ep2": [*TP2, "expert_model_parallel_size=2", "expert_tensor_parallel_size=1"],
}
MORE = [("dfc_x4", "pp2"), ("dfc_x4", "dp2"), ("mhc_x4", "tp2"), ("residual", "ep2"), ("dhc_x4", "tp2_ep2")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connection", "layout"),
    [
        ("dfc_x4", "tp2"),
        ("dhc_x4", "pp2"),
        ("dfc_x4", "ep2"),
        ("mhc_x4", "dp2"),
        *(pytest.param(*pair, marks=pytest.mark.soak) for pair in MORE),
    ],
)
def test_every_request_has_the_answer_of_one_rank(connection: str, layout: str, trials: Trials, tmp_path: Path) -> None:
    done = trials.evaluate(connection, tmp_path / "out", *LAYOUTS[layout], ranks=2)
    assert done.code == 0, done.printed
    assert re.search(r"local_choice  acc \d\.\d{4} ± \d\.\d{4}  acc_norm \d\.\d{4}  \d+ documents\n", done.printed)
    expected, found = answers(trials.on_one_rank[connection]), answers(tmp_path / "out")
    assert found.keys() == expected.keys()
    texts = 0
    for key, answer in expected.items():
        if isinstance(answer, str):
            assert found[key] == answer
            texts += 1
        else:
            assert found[key][0] == pytest.approx(answer[0], abs=CLOSE)
            assert found[key][1] == answer[1]
    assert texts == 5
    # Another model's answers differ by more.
    other = answers(trials.on_one_rank["dfc_x4" if connection != "dfc_x4" else "dhc_x4"])
    assert max(abs(other[key][0] - answer[0]) for key, answer in expected.items() if isinstance(answer, list)) > 0.01


@pytest.fixture(scope="module")
def direct(trials: Trials) -> dict[str, Any]:
    """Each request of dhc_x4 alone: tokens by the tokenizer's own library, Megatron's logits, softmax by hand."""
    script = Path(__file__).parents[1] / "support" / "direct_scores.py"
    places = (script, trials.config, trials.checkpoints["dhc_x4"], trials.tasks)
    words = [fork_server.python(), *map(str, places), "connection=dhc"]
    done = subprocess.run(words, env=runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_results_are_those_of_a_direct_computation(direct: dict[str, Any], trials: Trials) -> None:
    found = json.loads((trials.on_one_rank["dhc_x4"] / "iter_0000006.json").read_text())["tasks"]
    assert found["local_choice"]["metrics"] == pytest.approx(direct["local_choice"])
    assert math.log(found["local_cloze"]["value"]) == pytest.approx(-direct["local_cloze"], abs=CLOSE)
    assert found["local_text"]["value"] == pytest.approx(direct["local_text"], abs=CLOSE)
    scores = [answer[0] for answer in answers(trials.on_one_rank["dhc_x4"]).values() if isinstance(answer, list)]
    for logprob in direct["scores"]:
        assert min(abs(logprob - score) for score in scores) < CLOSE


@pytest.mark.slow
def test_perplexity_of_texts_and_of_indexed_files(direct: dict[str, Any], trials: Trials, tmp_path: Path) -> None:
    """By document the bits per byte of the harness, by chunk the loss by hand, on two ranks; one file of each kind."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(yaml.safe_load(trials.config.read_text())["data"]["tokenizer_model"])
    texts = [json.loads(line)["text"] for line in (trials.tasks / "texts.jsonl").read_text().splitlines()]
    write_indexed(
        tmp_path / "indexed", [tokenizer(text).input_ids for text in texts], len(tokenizer), eod=tokenizer.eos_token_id
    )
    words = ["evaluate", "perplexity", trials.checkpoints["dhc_x4"], trials.config, "connection=dhc"]
    words += ["--out", tmp_path / "out"]
    words += ["--sets", f"lines={trials.tasks / 'texts'}", f"indexed={tmp_path / 'indexed'}", "--by"]
    out = words.index("--out") + 1
    for by, ranks in (("document", 1), ("chunk", 2)):
        words[out] = tmp_path / by
        done = run(tmp_path, *words, by, ranks=ranks)
        assert done.code == 0, done.printed
        found = json.loads((tmp_path / by / "iter_0000006.json").read_text())["perplexity"]
        for key in ("value", "perplexity", "bits_per_byte", "tokens", "bytes"):
            assert found["lines"][key] == pytest.approx(found["indexed"][key], abs=1e-9)
        if by == "document":
            assert found["lines"]["bits_per_byte"] == pytest.approx(direct["local_text"], abs=CLOSE)
            assert found["lines"]["bytes"] == sum(len(text.encode()) for text in texts)
        else:
            assert found["lines"]["value"] == pytest.approx(direct["chunk_loss"], abs=CLOSE)
            assert found["lines"]["tokens"] == direct["chunk_tokens"]
            assert found["lines"]["perplexity"] == pytest.approx(math.exp(direct["chunk_loss"]), rel=CLOSE)
    for name in ("indexed.idx", "indexed.bin"):
        shutil.copy(tmp_path / name, tmp_path / f"copy-of-{name}")
    copied = [word.replace("/indexed", "/copy-of-indexed") if isinstance(word, str) else word for word in words]
    done = run(tmp_path, *copied, "chunk")
    assert done.code == 0, done.printed
    assert "nothing to do: " in done.printed
    with (tmp_path / "indexed.bin").open("r+b") as tokens:
        tokens.seek(-4, os.SEEK_END)
        tokens.write(bytes(2))
    (tmp_path / "other.jsonl").write_text('{"text": "another text"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for given, said in (
        ("c4=/nowhere/c4", "no validation set /nowhere/c4"),
        ("c4", "--sets c4: write NAME=FILE"),
        (f"lines={tmp_path / 'other'}", "the content of lines has changed since the result of "),
        (f"indexed={tmp_path / 'indexed'}", "the content of indexed has changed since the result of "),
        (f"empty={tmp_path / 'empty'}", "has no token to score, not one chunk of seq_length=32: give --by document"),
    ):
        done = run(tmp_path, *words[:-3], given, "--by", "chunk")
        assert done.code == 2
        assert said in done.printed


@pytest.mark.slow
def test_no_request_is_run_twice_after_a_kill(trials: Trials, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = Path(__file__).parents[1] / "support" / "killed_evaluation.py"
    words = ["evaluate", trials.checkpoints["dfc_x4"], trials.config]
    words += ["--tasks", "local_choice", "local_text", "--include", trials.tasks]
    words += ["--out", out, "--batch-size", "1"]
    command = [fork_server.python(), str(script), str(tmp_path / "rows"), *map(str, words)]
    codes = []
    for limit in ("3", "1000"):
        killed = subprocess.run([*command[:3], limit, *command[3:]], env=runs.environment(), capture_output=True)
        codes.append(killed.returncode)
    assert codes == [-9, 0]
    rows = (tmp_path / "rows").read_text().splitlines()
    written = answers(out)
    # The round in which the process died was not answered; every other row was scored once.
    assert len(rows) - len(set(rows)) == int((tmp_path / "rows.lost").read_text())
    assert len(set(rows)) == len(written)
    expected = answers(trials.on_one_rank["dfc_x4"])
    assert all(written[key][0] == pytest.approx(expected[key][0], abs=CLOSE) for key in written)
    results = json.loads((out / "iter_0000006.json").read_text())["tasks"]
    whole = json.loads((trials.on_one_rank["dfc_x4"] / "iter_0000006.json").read_text())["tasks"]
    assert results["local_choice"]["metrics"] == whole["local_choice"]["metrics"]


def test_a_second_call_adds_what_is_missing(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several checkpoints, one with a corrupt optimizer; shots, a limit, data from a folder without their source."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    checkpoints = shutil.copytree(trials.checkpoints["dfc_x4"], tmp_path / "dfc_x4" / "checkpoints")
    corrupt(checkpoints / "iter_0000003", "optimizer.")
    folder = write_tasks(tmp_path)
    words = ["--tasks", "local_choice", "local_text", "--include", folder, "--to", tmp_path / "data"]
    fetched = run(tmp_path, "evaluate", "fetch", *words)
    assert fetched.code == 0, fetched.printed
    assert "local_choice: 5 documents" in fetched.printed
    for file in folder.glob("*.jsonl"):
        file.unlink()
    out, offline = tmp_path / "out", ["--data", tmp_path / "data", "--every", 3, "--limit", 2]
    (tmp_path / "list.yaml").write_text("tasks: {local_choice: {shots: 1}}")
    listed = ["--tasks", tmp_path / "list.yaml"]

    def evaluated(*words: object, of: Path = checkpoints, to: Path = out, ranks: int = 1) -> Done:
        return evaluate(trials.config, of, folder, to, *words, ranks=ranks)

    done = evaluated(*listed, *offline)
    assert done.code == 0, done.printed
    assert "git" not in done.printed
    assert [path.name for path in sorted(out.glob("*.json"))] == ["iter_0000003.json", "iter_0000006.json"]
    done = evaluated(*listed, "local_text", *offline)
    assert done.code == 0, done.printed
    results = json.loads((out / "iter_0000003.json").read_text())
    assert results["tokens"] == 3 * 4 * 32
    assert {name: task["documents"] for name, task in results["tasks"].items()} == {"local_choice": 2, "local_text": 2}
    assert {name: task["shots"] for name, task in results["tasks"].items()} == {"local_choice": 1, "local_text": 0}
    again = evaluated(*listed, "local_text", *offline)
    assert again.code == 0
    assert again.printed.splitlines()[-1] == f"nothing to do: {out} has all of these results"
    for words, said in (
        ([*offline, "--tasks", "local_choice"], "has a result already, with shots=1, and not 0: give another --out"),
        (["--data", tmp_path / "data", "--limit", 1], "has a result already, with limit=2, and not 1: give another"),
        ([*offline, "bf16=true"], "is of another model, precision: torch.float32 there, torch.bfloat16 here"),
        ([*offline, "seq_length=16"], "is of another model, seq_length: 32 there, 16 here: give another --out"),
    ):
        refused = evaluated(*words, *([] if "--tasks" in words else listed))
        assert refused.code == 2, refused.printed
        assert said in refused.printed
    path = folder / "local_text.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "description": "Code."}))
    refused = evaluated(*listed, "local_text", *offline)
    assert refused.code == 2, refused.printed
    said = f"local_text has changed since the result of {checkpoints / 'iter_0000003'} was written: give another --out"
    assert said in refused.printed
    plain = ["connection=residual", *offline, *listed]
    other = evaluated(*plain, of=trials.checkpoints["residual"])
    assert other.code == 2, other.printed
    assert "is of another model, checkpoint: " in other.printed
    corrupt(checkpoints / "iter_0000006", "decoder.")
    without = evaluated(*listed, *offline, to=tmp_path / "without", ranks=2)
    assert without.code == 2, without.printed
    assert f"move {checkpoints / 'iter_0000006'} out of its folder and evaluate the others, with" in without.printed
    assert "Traceback" not in without.printed
    shutil.move(checkpoints / "iter_0000006", tmp_path)
    done = evaluated(*listed, *offline, to=tmp_path / "without")
    assert done.code == 0, done.printed
    assert [path.name for path in (tmp_path / "without").glob("*.json")] == ["iter_0000003.json"]
    missing = evaluated("--tasks", "local_choice", "local_cloze", "--data", tmp_path, "--every", 3)
    assert missing.code == 2
    assert "the data of local_choice, local_cloze are not in" in missing.printed
    assert f"run `megatron-fc evaluate fetch --to {tmp_path}` with the same --tasks" in missing.printed


@pytest.mark.slow
def test_blank_contexts_and_drawn_texts(trials: Trials, tmp_path: Path) -> None:
    """The harness moves blanks behind the context. A text that ends at an empty word does not end; each is drawn anew.

    Two replicas draw four continuations of one prompt.
    """
    rows = ({"context": " ", "text": "x"}, {"context": "", "text": " x"})
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    shared |= {"test_split": "test", "doc_to_text": "{{context}}", "doc_to_target": "{{text}}", "target_delimiter": ""}
    scored = {"task": "blank", "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]}
    kwargs = {"until": [""], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    drawn = {"task": "drawn", "output_type": "generate_until", "generation_kwargs": kwargs, "repeats": 4}
    drawn |= {"doc_to_text": "def f(x):", "metric_list": [{"metric": "exact_match"}]}
    for task in (scored, drawn):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    words = ["--tasks", "blank", "drawn", "--limit", "2", "--batch-size", "1"]
    done = evaluate(trials.config, trials.checkpoints["dfc_x4"], tmp_path, tmp_path / "out", *words, ranks=2)
    assert done.code == 0, done.printed
    found = list(answers(tmp_path / "out").values())
    (score,) = (answer for answer in found if isinstance(answer, list))
    assert score[0] < -0.1
    texts = [answer for answer in found if isinstance(answer, str)]
    assert all(texts)
    assert len(set(texts)) == len(texts) == 8  # of two documents, which have the same prompt


@pytest.mark.soak  # tests/examples runs it on one rank
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_harness_s_own_command_line(ranks: int, trials: Trials, tmp_path: Path) -> None:
    words = ["run", "--model", "megatron_fc", "--tasks", "local_choice,local_text", "--include_path", trials.tasks]
    words += ["--model_args", f"checkpoint={trials.checkpoints['dfc_x4']}", f"config={trials.config}"]
    words += ["--batch_size", "2", "--output_path", tmp_path / "results.json", "--use_cache", tmp_path / "cache"]
    done = run(tmp_path, "lm-eval", *words, ranks=ranks)
    assert done.code == 0, done.printed
    found = json.loads(next(tmp_path.glob("results*.json")).read_text())["results"]
    expected = json.loads((trials.on_one_rank["dfc_x4"] / "iter_0000006.json").read_text())["tasks"]
    assert found["local_choice"]["acc_norm,none"] == expected["local_choice"]["metrics"]["acc_norm"]
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(expected["local_text"]["value"], abs=CLOSE)
    assert (tmp_path / "cache_rank0.db").exists()
    unknown = run(tmp_path, "lm-eval", *["local_choices" if "local_choice" in str(word) else word for word in words])
    assert unknown.code == 2, unknown.printed
    assert unknown.printed.splitlines()[-1] == "megatron-fc: the harness refuses this: Tasks not found: local_choices"


@pytest.mark.slow
def test_a_chat_template_is_refused(trials: Trials, tmp_path: Path) -> None:
    words = ["--model_args", f"checkpoint={trials.checkpoints['dfc_x4']}", f"config={trials.config}"]
    words += ["--tasks", "local_choice", "--include_path", str(trials.tasks), "--apply_chat_template"]
    done = run(tmp_path, "lm-eval", "run", "--model", "megatron_fc", *words)
    assert done.code == 2, done.printed
    assert "--apply_chat_template: Megatron's tokenizers have no template, leave it out" in done.printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["context_parallel_size=2", "--tasks", "local_choice"], "context_parallel_size=2: evaluation keeps sequences"),
        (["moe_expert_capacity_factor=1.0", "--tasks", "local_choice"], "set moe_expert_capacity_factor=null"),
        (["padded_vocab_size=256", "--tasks", "local_choice"], "padded_vocab_size=256, but"),
        (["hidden_size=64", "--tasks", "local_choice"], "hidden_size: 32 in "),
        (
            ["connection=residual", "--tasks", "local_choice"],
            "this run has plain residual connections: add connection=dfc rate=4",
        ),
        (["moe_router_topk=1", "--tasks", "local_choice"], "moe_router_topk: 2 in "),
        (["moe_input_jitter_eps=0.1", "--tasks", "local_choice"], "set moe_input_jitter_eps=null"),
        (["moe_router_force_load_balancing=true", "--tasks", "local_choice"], "route at random, in evaluation too"),
        (["expert_model_parallel_size=2"], "and expert_model_parallel_size=2 take 2 ranks or a multiple, not 1: start"),
        (["tokenizer_model=/usr"], "Megatron refuses the tokenizer: no tokenizer can be made of tokenizer_type"),
        (["--limit", "0"], "--limit 0: give a number from 1 on"),
        (["--every", "5"], "no complete checkpoint at a multiple of iteration 5: lower --every"),
    ],
)
def test_refusals(words: list[str], said: str, trials: Trials, tmp_path: Path) -> None:
    done = trials.evaluate("dfc_x4", tmp_path / "out", *words)
    assert done.code == 2, done.printed
    assert said in done.printed
    assert "Traceback" not in done.printed


@pytest.mark.slow
def test_a_larger_tokenizer_is_refused(trials: Trials, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(yaml.safe_load(trials.config.read_text())["data"]["tokenizer_model"])
    tokenizer.add_tokens([f"word{number}" for number in range(200)])
    tokenizer.save_pretrained(tmp_path / "larger")
    words = [f"tokenizer_model={tmp_path / 'larger'}", "--tasks", "local_choice"]
    done = trials.evaluate("dfc_x4", tmp_path / "out", *words)
    assert done.code == 2, done.printed
    assert "tokens, and the model's vocabulary 384: give the tokenizer that the model was trained with" in done.printed

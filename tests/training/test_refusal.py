"""What Megatron refuses before the first step: one sentence, exit code 2, and the same on the login node."""

import subprocess
from pathlib import Path

import pytest

from megatron_fc.cli.main import main
from megatron_fc.errors import UserError
from megatron_fc.training.refusal import Refusals, refusal, refusals_named
from support.training_runs import command, environment
from support.training_runs import config as config

# What Megatron raises as it builds the model's config, the schedules, the data and at its first step.
SETTINGS = [
    (["moe_router_enable_expert_bias=true"], "Expert bias for aux-loss-free routing only supports"),
    (["moe_router_topk=1", "moe_router_pre_softmax=false"], "Please use --moe-router-pre-softmax when topk is 1."),
    (["moe_router_topk=5"], "moe_router_topk=5: there are num_experts=4, set at most that many"),
    (["eval_interval=0"], "eval_interval=0 must be at least 1; eval_iters=0 leaves validation out"),
    (["log_interval=0"], "log_interval=0 must be at least 1; the default is 100"),
    (["tensorboard_log_interval=0"], "tensorboard_log_interval=0 must be at least 1"),
    (["lr=null"], "lr is not set: set it"),
    (["eval_interval=null"], "eval_interval is not set: set it; eval_iters=0 leaves validation out"),
    (["seq_length=0"], "seq_length=0 must be at least 1"),
    (["seed=0"], "seed=0 must be at least 1"),
    (["lr_warmup_iters=40"], "lr_warmup_iters=40 is not below lr_decay_iters=40, which counts the warm-up in"),
    (["lr_warmup_iters=0", "lr_warmup_fraction=1.5"], "lr_warmup_fraction=1.5 must be at least 0 and below 1"),
    (["lr_decay_style=WSD"], "Megatron refuses the schedule: wsd_decay_steps is not None does not hold ("),
    (["adam_beta1=1.5"], "adam_beta1=1.5 must be at least 0 and below 1"),
    (["moe_router_num_groups=3", "moe_router_group_topk=1"], "should be divisible by moe_router_num_groups (3)."),
    (["group_query_attention=true", "num_query_groups=3"], "num_query_groups=3 does not divide num_attention_heads=2"),
    (["moe_layer_freq=[1, 0, 1]"], "moe_layer_freq=[1, 0, 1] has 3 entries, and num_layers=2: give one each"),
    (["moe_layer_freq=0"], "moe_layer_freq=0 must be at least 1"),
    (["checkpoint_activations=true"], "--checkpoint-activations is no longer valid, use --recompute-activations"),
    (["ffn_hidden_size=0"], "ffn_hidden_size=0 must be at least 1"),
]


@pytest.mark.parametrize("where", ["train", "topology"])
@pytest.mark.parametrize(("words", "sentence"), SETTINGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_one_sentence_in_the_run_and_on_the_login_node(
    config: Path,
    tmp_path: Path,
    where: str,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    options = ["--nodes", "1", "--gpus-per-node", "1"] if where == "topology" else []
    assert main([where, str(config), f"run_dir={tmp_path / 'run'}", *words, *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("megatron-fc: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["moe_ffn_hidden_size=33"], "moe_ffn_hidden_size=33 is no multiple of expert_tensor_parallel_size=2: choose"),
        (
            ["num_experts=null", "ffn_hidden_size=33"],
            "ffn_hidden_size=33 is no multiple of tensor_model_parallel_size",
        ),
        (["sequence_parallel=true", "seq_length=31"], "seq_length=31 is no multiple of tensor x context parallelism=2"),
    ],
)
def test_what_tensor_parallelism_cannot_divide(
    config: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["tensor_model_parallel_size=2", "--nodes", "1", "--gpus-per-node", "2"]
    assert main(["topology", str(config), *words, *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_what_only_the_run_can_see_is_a_sentence_too(config: Path, tmp_path: Path) -> None:
    """A tokenizer that cannot be made: Megatron makes it behind the log, which keeps the traceback."""
    words = command(config, f"run_dir={tmp_path / 'run'}", "tokenizer_type=NullTokenizer", "mock_data=true")
    words += ["train_data_path=null", "valid_data_path=null"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-fc: Megatron refuses this run: no tokenizer can be made of tokenizer_type,")
    assert done.stderr.count("\n") == 1
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank0.log").read_text()


def raised(body: str, module: str) -> BaseException:
    """An exception as code of a module raises it; a file, as the words of an assertion are read from one."""
    file = Path(raised.folder) / f"{abs(hash((body, module)))}.py"  # type: ignore[attr-defined]
    file.write_text(f"def run(args):\n    {body}\n")
    scope = {"__name__": module}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    args = type("Arguments", (), {"width": 12, "heads": 5, "zero": 0, "names": None})
    try:
        scope["run"](args)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError(f"{body} raises nothing")


@pytest.mark.parametrize(
    ("body", "module", "sentence"),
    [
        (
            "assert args.width % args.heads == 0",
            "megatron.core.x",
            "width % heads == 0 does not hold for width=12, heads",
        ),
        ("assert args.heads is None, 'no  heads'", "megatron.core.x", "no heads"),
        ("raise RuntimeError('world size')", "megatron.training.x", "world size"),
        ("raise KeyError", "megatron.training.x", "KeyError ("),
        ("args.width // args.zero", "megatron.core.x", "zero is 0, and it divides by it: set it to 1 or more"),
        ("raise ValueError('beta 1.5')", "torch.optim.x", "beta 1.5"),
        ("import no_such_package", "megatron.core.x", "the package no_such_package is not installed"),
        # What is no refusal: torch and the system, a slip in code.
        ("raise RuntimeError('NCCL')", "torch.distributed.x", None),
        ("raise OSError('gone')", "torch.x", None),
        ("args.names.first", "megatron.core.x", None),
        ("args.width // args.zero", "torch.x", None),
        ("__import__('torch').zeros(2).view(3)", "megatron.core.x", None),
    ],
)
def test_what_is_a_refusal(tmp_path: Path, body: str, module: str, sentence: str | None) -> None:
    raised.folder = tmp_path  # type: ignore[attr-defined]
    said = refusal(raised(body, module))
    assert said is None if sentence is None else said is not None and said.startswith(sentence)


def test_after_the_first_step_an_error_is_an_error(tmp_path: Path) -> None:
    raised.folder = tmp_path  # type: ignore[attr-defined]
    error, refusals = raised("assert args.heads is None", "megatron.core.x"), Refusals()
    assert isinstance(refusals.failed(error), UserError)
    refusals.after_step(0)
    assert refusals.failed(error) is error


def test_the_projects_own_assertions_are_bugs() -> None:
    from megatron_fc.planning.shape import Shape

    with pytest.raises(TypeError), refusals_named("nothing"):
        Shape()  # type: ignore[call-arg]

"""`megatron-fc distill` with the real ModelOpt: what the student learns, and what is refused."""

import re
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support.compress_commands import Done, run
from support.compress_runs import config, plain, tensors, trained  # noqa: F401  (fixtures)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    import rank
    from support import tiny

from megatron_fc import FracConfig
from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.profiling.files import read_report

pytestmark = pytest.mark.modelopt

_DIVERGENCE = re.compile(r"\| distillation loss: (\S+) \|")


def distill(config: Path, name: str, *words: object) -> tuple[Done, list[float]]:  # noqa: F811
    """Run it; returns the divergence of each iteration too."""
    done = run(config.parent, "distill", config, f"run_dir={config.parent / name}", *words)
    log = config.parent / name / "logs" / "rank0.log"
    return done, [float(value) for value in _DIVERGENCE.findall(log.read_text())] if log.exists() else []


@pytest.mark.parametrize("teacher", ["plain", "trained"])
def test_fresh_student_approaches_the_teacher(
    teacher: str,
    config: Path,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(teacher)
    done, divergence = distill(config, f"of_{teacher}", "--teacher", folder, "save_interval=40")
    assert done.code == 0, done.printed
    assert len(divergence) == 40
    assert divergence[-1] < 0.1 * divergence[0]
    losses = [float(value) for value in re.findall(r"iteration \d+/40  loss (\S+)", done.printed)]
    assert losses[-1] < losses[0] - 0.3
    checkpoint = latest_checkpoint(config.parent / f"of_{teacher}" / "checkpoints")
    assert not any("teacher" in key for key in tensors(checkpoint))
    assert tensors(checkpoint).keys() == tensors(latest_checkpoint(request.getfixturevalue("trained"))).keys()


@pytest.mark.parametrize("connection", ["dfc", "mhc"])
def test_student_at_the_identity_is_the_teacher(config: Path, plain: Path, connection: str) -> None:  # noqa: F811
    """A plain model that got untrained connections has its logits: no divergence, although the loss is there."""
    words = [f"load={plain}", "from_residual=true", "no_load_optim=true", "finetune=true", "train_iters=1"]
    done, divergence = distill(config, f"twin_{connection}", "--teacher", plain, f"connection={connection}", *words)
    assert done.code == 0, done.printed
    assert divergence[0] == pytest.approx(0, abs=1e-6)


def test_student_of_another_shape_with_both_losses(config: Path, plain: Path) -> None:  # noqa: F811
    words = ["--teacher-config", config, "num_layers=1", "hidden_size=64", "train_iters=4", "--temperature", "2"]
    done, divergence = distill(config, "other", "--teacher", plain, *words, "--lm-loss-weight", "0.5")
    assert done.code == 2  # that file has Frac-Connections
    assert "has plain residual connections, this run has dfc_x4" in done.printed
    words[1] = plain_file = config.parent / "plain.yaml"
    plain_file.write_text(config.read_text().replace("connection: dfc", "connection: residual"))
    done, divergence = distill(config, "other", "--teacher", plain, *words, "--lm-loss-weight", "0.5")
    assert done.code == 0, done.printed
    assert len(divergence) == 4


def test_its_traffic_is_profiled(config: Path, plain: Path) -> None:  # noqa: F811
    """Two callbacks on one run: the teacher's forward pass is counted, and the loss is the divergence."""
    out, alone = config.parent / "profiled", config.parent / "profiled_alone"
    words = ["traffic", "run", config, "--from-step", "1", "--steps", "1", "--out"]
    for folder, teacher in ((out, ["--teacher", plain]), (alone, [])):
        done = run(config.parent, *words, folder, *teacher)
        assert done.code == 0, done.printed
    # The window ends where the step behind it begins.
    assert len(_DIVERGENCE.findall((out / "logs" / "rank0.log").read_text())) == 3
    report, without = read_report(out / "traffic.json"), read_report(alone / "traffic.json")
    kinds = {key: count.read_bytes for key, count in report.ranks[0].kinds.items() if key.phase == "forward"}
    kinds_alone = {key: count.read_bytes for key, count in without.ranks[0].kinds.items() if key.phase == "forward"}
    assert sum(kinds.values()) > 1.5 * sum(kinds_alone.values())


@pytest.fixture
def one_rank() -> Iterator[None]:
    with rank.one_rank():
        yield


@pytest.mark.usefixtures("one_rank")
def test_loss_is_the_divergence_at_the_temperature_and_its_share_of_the_next_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.training import global_vars

    from megatron_fc.compress.distill import Distillation

    teacher, student = (tiny.build("dense", frac, seed) for seed, frac in enumerate((None, FracConfig(rate=4))))
    t = tiny.tokens(3)
    mask = torch.ones(t[:, 1:].shape)
    mask[:, ::3] = 0
    with torch.no_grad():
        scaled = [(tiny.logits(model, t) / 2).log_softmax(-1) for model in (teacher, student)]
        divergence = (F.kl_div(scaled[1], scaled[0], reduction="none", log_target=True).sum(-1) * mask).sum()
        next_token = (F.cross_entropy(tiny.logits(student, t).transpose(1, 2), t[:, 1:], reduction="none") * mask).sum()

    distillation = Distillation.__new__(Distillation)
    distillation._temperature, distillation._lm_loss_weight = 2.0, 0.5
    monkeypatch.setattr(distillation, "_load_teacher", lambda: teacher)
    (student,) = distillation.model_built(Namespace(), [student], None)
    checks = Namespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", checks)
    loss, tokens, report = distillation._loss(student, mask, student(*tiny.inputs(t), labels=t[:, 1:]))
    assert divergence > 1e-3
    assert tokens == mask.sum()
    assert report["distillation loss"][0].item() == pytest.approx(divergence.item(), rel=1e-4)
    assert report["lm loss"][0].item() == pytest.approx(next_token.item(), rel=1e-4)
    assert loss.item() == pytest.approx((divergence + 0.5 * next_token).item(), rel=1e-4)


def test_teacher_of_another_file_shares_the_layout(config: Path, plain: Path) -> None:  # noqa: F811
    from megatron_fc.compress.distill import teacher_recipe

    overrides = ["data.seq_length=16", "bf16=true", "num_layers=1", "model.hidden_size=64"]
    words = teacher_recipe(config, overrides, config, plain).argv
    assert words[words.index("--seq-length") + 1] == "16"
    assert "--bf16" in words
    assert words[words.index("--num-layers") + 1] == "2"
    assert words[words.index("--hidden-size") + 1] == "32"


def test_refusals(config: Path, plain: Path) -> None:  # noqa: F811
    for words, said in (
        (["--temperature", "0"], "must be positive"),
        (["--lm-loss-weight", "-1"], "would reward a loss"),
        (["num_layers=1"], "does not fit its config"),
        (["seq_length=16", "--teacher-config", config], "this run has dfc_x4"),
    ):
        done, _ = distill(config, "never", "--teacher", plain, *words)
        assert done.code == 2, done.printed
        assert said in done.printed
    done, _ = distill(config, "never", "--teacher", config.parent / "text")
    assert done.code == 2
    assert "holds no checkpoint" in done.printed


def test_settings_that_do_not_go_with_a_teacher() -> None:
    from megatron_fc.compress.distill import Distillation
    from megatron_fc.errors import UserError

    distillation = Distillation.__new__(Distillation)
    distillation._args = Namespace(seq_length=32)
    with pytest.raises(UserError, match=r"pipeline_model_parallel_size=2 of the student: set it to 1"):
        distillation.arguments_valid(Namespace(seq_length=32, pipeline_model_parallel_size=2))
    with pytest.raises(UserError, match=r"seq_length is 32 for the teacher, 64 for the student"):
        distillation.arguments_valid(Namespace(seq_length=64))

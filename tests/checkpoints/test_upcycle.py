"""Plain checkpoints -> connections and back: against models in this process, and in whole runs."""

import itertools
import json
import pickle
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import unwrap_model
from megatron.training import global_vars

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.checkpoints import derive
from megatron_fc.checkpoints.location import find_checkpoint, latest_checkpoint
from megatron_fc.checkpoints.upcycle import to_residual, upcycle
from megatron_fc.cli.main import main
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.ends import LearnedLeave
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.connections.site import Site
from megatron_fc.errors import UserError
from megatron_fc.megatron import specs
from megatron_fc.megatron.flags import stored_connection
from megatron_fc.megatron.stored_connections import difference
from megatron_fc.runs.metrics import read_metrics
from support import fork_server, harness, tiny
from support import training_runs as runs
from support.compress_commands import run
from support.documented import snippets
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

DFC = FracConfig(rate=4)
DHC, BETWEEN = HyperConfig(slots=4), HyperConfig(slots=4, fractions=2)
MHC, LEARNED = ManifoldConfig(slots=4), ManifoldConfig(slots=4, leave="learned")
MFC = ManifoldConfig(slots=4, fractions=4)
ITERATION, SAMPLES = 3, 12

config = runs.config


class Run:
    """A tiny model with its optimizer: fp32, bf16, or fp32 under the distributed optimizer."""

    def __init__(self, kind: str, frac: ConnectionConfig | None, precision: str = "fp32", seed: int = 1) -> None:
        bf16, distributed = precision == "bf16", precision == "distributed"
        options: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16} if bf16 else {}
        model = tiny.build(kind, frac, seed=seed, **options)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        self.model = DistributedDataParallel(model.config, ddp, model)
        optimizer = OptimizerConfig(
            optimizer="adam", lr=3e-3, weight_decay=0.1, use_distributed_optimizer=distributed, **options
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.model])
        self.content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if distributed:
            self.content["distrib_optim_sharding_type"] = "fully_reshardable"

    @property
    def chunks(self) -> list[torch.nn.Module]:
        return unwrap_model([self.model])

    def step(self, number: int) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = tiny.loss(self.model, tiny.tokens(seed=number, batch=4))
        loss.backward()
        self.model.finish_grad_sync()
        assert self.optimizer.step()[0]
        return loss.item()

    def state(self, loading: bool) -> dict[str, Any]:
        metadata = {**self.content, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        model = {"model": self.chunks[0].sharded_state_dict(metadata=metadata)}
        return {**model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}

    def save(self, folder: Path) -> Path:
        checkpoint = folder / f"iter_{ITERATION:07d}"
        checkpoint.mkdir(parents=True)
        args = Namespace(no_save_optim=False, consumed_train_samples=SAMPLES)
        common = {"args": args, "iteration": ITERATION}
        dist_checkpointing.save(
            {**common, **self.state(loading=False)}, str(checkpoint), content_metadata={**self.content}
        )
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        return checkpoint

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """The strict way: a key too many or too few is an error."""
        loaded = dist_checkpointing.load(self.state(loading=True), str(checkpoint), strict="raise_all")
        unwrap_model(self.model).load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        return loaded


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {key: loaded[key] for key in dist_checkpointing.load_tensors_metadata(str(checkpoint))}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoint of a plain MoE model after three steps."""
    folder = tmp_path_factory.mktemp("plain")
    run = Run("moe", None)
    for step in range(ITERATION):
        run.step(step)
    return run.save(folder)


@pytest.mark.parametrize(
    ("kind", "precision", "connection"),
    [
        ("moe", "fp32", DFC),
        ("mixed", "bf16", DFC),
        ("hybrid", "bf16", DFC),
        ("mtp", "fp32", DFC),
        ("mla", "fp32", DFC),
        ("moe", "fp32", DHC),
        ("hybrid", "bf16", DHC),
        ("mtp", "fp32", BETWEEN),
        ("moe", "fp32", MHC),
        ("hybrid", "bf16", LEARNED),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_model_goes_on_from_the_upcycled_checkpoint(
    kind: str, precision: str, connection: ConnectionConfig, tmp_path: Path
) -> None:
    # mHC is the residual network up to the epsilons of its coefficients, 1e-6 each; observed are 9e-7 and 4e-3.
    rounding = {"fp32": 5e-6, "bf16": 2e-2}[precision] if isinstance(connection, ManifoldConfig) else 0.0
    old = Run(kind, None, precision)
    for step in range(ITERATION):
        old.step(step)
    source = old.save(tmp_path / "plain")
    new = Run(kind, connection, precision, seed=2)
    said = upcycle(new.chunks, source, tmp_path / "new", connection)

    before = tensors(source)
    checkpoint = find_checkpoint(tmp_path / "new")
    after = tensors(checkpoint)
    added = {key: value for key, value in after.items() if is_connection_key(key)}
    assert_same({key: value for key, value in after.items() if key not in added}, before)
    parameters = {key for key in added if not key.startswith("optimizer.")}
    assert any("final" in key for key in parameters) == (connection == LEARNED)
    assert said.startswith(f"{len(parameters)} {connection.label} tensors are missing in {source} and start as")
    moments = [value for key, value in added.items() if key.startswith("optimizer.state.exp_avg")]
    assert moments
    assert not any(value.any() for value in moments)

    loaded = new.load(checkpoint)
    assert loaded["iteration"] == ITERATION
    assert loaded["args"].consumed_train_samples == SAMPLES
    assert stored_connection(loaded["args"]) == connection
    old.model.eval()
    new.model.eval()
    batch = tiny.tokens(seed=9)
    expected = tiny.logits(old.model, batch)
    torch.testing.assert_close(tiny.logits(new.model, batch), expected, rtol=rounding, atol=rounding)
    old.model.train()
    new.model.train()
    start = {name: p.detach().clone() for name, p in new.model.named_parameters() if is_connection_key(name)}
    assert new.step(ITERATION) == pytest.approx(old.step(ITERATION), rel=0, abs=rounding)
    moved = {name for name, p in new.model.named_parameters() if name in start and not torch.equal(p, start[name])}
    assert {name for name in start if name.endswith(("static_beta", "mapping_scale"))} <= moved
    assert new.step(ITERATION + 1) < 6


@pytest.mark.parametrize("connection", [MHC, LEARNED], ids=["mean", "learned"])
def test_streams_of_an_upcycled_mhc_model_part(connection: ConnectionConfig, plain: Path, tmp_path: Path) -> None:
    """They start as copies; without a random mapping they would stay so, and the loss would fall all the same."""
    run = Run("moe", connection)
    upcycle(run.chunks, plain, tmp_path / "new", connection)
    run.load(find_checkpoint(tmp_path / "new"))
    seen: list[torch.Tensor] = []
    last = run.chunks[0].decoder.layers[-1]  # type: ignore[union-attr,index]
    last.register_forward_hook(lambda _layer, _inputs, output: seen.append(output[0].detach()))
    for step in range(ITERATION, ITERATION + 11):
        run.step(step)
    first, *others = seen[0].unflatten(-1, (4, tiny.WIDTH)).unbind(-2)
    assert all(torch.equal(stream, first) for stream in others)
    streams = seen[-1].unflatten(-1, (4, tiny.WIDTH)).unbind(-2)
    apart = [(a - b).norm() / a.norm() for a, b in itertools.combinations(streams, 2)]
    assert min(apart) > 1e-5, "hundred roundings; 2e-4 was observed"


def test_connections_that_are_never_plain_are_refused(plain: Path, tmp_path: Path) -> None:
    for connection in (MFC, ManifoldConfig(slots=1)):
        with pytest.raises(UserError, match=f"^{connection.label} is never the residual network: start it from"):
            upcycle([], plain, tmp_path / "new", connection)
    assert not list(tmp_path.iterdir())


def test_distributed_optimizer_finds_every_state(tmp_path: Path) -> None:
    """It cannot load without TE or Apex, so its own checkpoint says what it would ask for."""
    old = Run("moe", None, "distributed")
    old.step(0)
    new = Run("moe", DFC, "distributed")
    upcycle(new.chunks, old.save(tmp_path / "plain"), tmp_path / "new", DFC)
    new.step(0)
    expected = tensors(new.save(tmp_path / "own"))
    found = tensors(find_checkpoint(tmp_path / "new"))
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    main_copy = "optimizer.state.param.decoder.layers.input_layernorm.connection.static_gamma"
    assert torch.equal(found[main_copy], torch.eye(4).flatten().expand(2, -1))


def test_optimizer_state_can_be_left_out(plain: Path, tmp_path: Path) -> None:
    said = upcycle(Run("moe", DFC).chunks, plain, tmp_path / "new", DFC, with_optimizer=False)
    assert "the optimizer starts at zero" in said
    checkpoint = find_checkpoint(tmp_path / "new")
    assert not any(key.startswith("optimizer.") for key in tensors(checkpoint))
    assert dist_checkpointing.load_common_state_dict(str(checkpoint))["args"].no_save_optim


def rename(key: str, name: str) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        index.state_dict_metadata[name] = index.state_dict_metadata.pop(key)

    return change


def widen(index: Any) -> None:
    tensor = index.state_dict_metadata["decoder.final_layernorm.weight"]
    tensor.size = torch.Size([2 * tiny.WIDTH])


def bucket(index: Any) -> None:
    state = next(key for key in index.state_dict_metadata if key.startswith("optimizer.state"))
    rename(state, "optimizer.distributed.dp_group_idx_0.gbuf_idx_0")(index)


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rename(NORM, "decoder.last_norm.weight"), f"lacks {NORM} of this model"),
        (lambda index: index.state_dict_metadata.pop(NORM), f"lacks {NORM} of this model"),
        (rename(f"optimizer.state.exp_avg.{NORM}", "more.weight"), "has more.weight, unknown to this model"),
        (widen, f"{NORM} has shape (128,) in the checkpoint"),
        (
            lambda index: index.state_dict_metadata.pop(f"optimizer.state.exp_avg_sq.{NORM}"),
            f"has the optimizer state exp_avg_sq for other parameters than this model trains, {NORM}",
        ),
        (
            rename(f"optimizer.state.exp_avg.{NORM}", f"optimizer.state.shampoo.{NORM}"),
            "has an optimizer state shampoo, whose value for a fresh parameter is not known",
        ),
        (bucket, "keeps its optimizer state in buckets (fully_reshardable), not by parameter"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    plain: Path, tmp_path: Path, change: Callable[[Any], None], sentence: str
) -> None:
    source = tmp_path / plain.name
    shutil.copytree(plain, source)
    index = pickle.loads((source / ".metadata").read_bytes())
    change(index)
    (source / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError) as refused:
        upcycle(Run("moe", DFC).chunks, source, tmp_path / "new", DFC)
    assert sentence in str(refused.value)
    assert str(source) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def test_connected_checkpoints_and_existing_targets_are_refused(plain: Path, tmp_path: Path) -> None:
    new = Run("moe", DFC)
    upcycle(new.chunks, plain, tmp_path / "new", DFC)
    with pytest.raises(UserError, match="has dfc_x4 connections already: train on with load="):
        upcycle(new.chunks, find_checkpoint(tmp_path / "new"), tmp_path / "again", DFC)
    with pytest.raises(UserError, match="exists and is never overwritten"):
        upcycle(new.chunks, plain, tmp_path / "new", DFC)
    with pytest.raises(UserError, match="has plain residual connections already"):
        to_residual(plain, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


@pytest.mark.parametrize(
    ("connection", "count"), [(DFC, 14), (DHC, 14), (MHC, 6), (LEARNED, 9)], ids=["dfc", "dhc", "mhc", "learned leave"]
)
def test_round_trip_is_the_plain_checkpoint(
    connection: ConnectionConfig, count: int, plain: Path, tmp_path: Path
) -> None:
    upcycle(Run("moe", connection).chunks, plain, tmp_path / "new", connection)
    said = to_residual(find_checkpoint(tmp_path / "new"), tmp_path / "back")
    assert said.startswith(f"{count} {connection.label} tensors of")
    back = find_checkpoint(tmp_path / "back")
    assert_same(tensors(back), tensors(plain))
    assert stored_connection(dist_checkpointing.load_common_state_dict(str(back))["args"]) is None
    assert Run("moe", None, seed=2).load(back)["iteration"] == ITERATION


@pytest.mark.parametrize(
    ("connection", "name", "accepted"),
    [
        (DFC, "static_beta", False),
        (DFC, "static_gamma", False),
        (DFC, "dynamic_weight", False),
        (DFC, "scale_alpha", True),
        (DHC, "static_gamma", False),
        (DHC, "dynamic_weight", False),
        (MHC, "mapping_scale", False),
        (LEARNED, "leave_bias", False),
        (LEARNED, "mapping_weight", True),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_trained_connections_stay(connection: ConnectionConfig, name: str, accepted: bool, tmp_path: Path) -> None:
    """Without a dynamic weight, what scales it has no effect; with a scale of 0, what it multiplies."""
    run = Run("moe", connection)
    for module in run.model.modules():
        if isinstance(module, (Site, LearnedLeave)):
            module.start_as_residual()
    next(p for key, p in run.model.named_parameters() if key.endswith(name)).data.flatten()[1:2].add_(1e-5)
    for key, p in run.model.named_parameters():
        if key.endswith("scale_alpha"):
            p.data.add_(0.1)
    run.optimizer.reload_model_params()
    source = run.save(tmp_path / "trained")
    if accepted:
        to_residual(source, tmp_path / "back")
        return
    with pytest.raises(UserError, match=f"{name} of the checkpoint .* is no identity any more"):
        to_residual(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_interrupted_writing_leaves_no_checkpoint(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    new = Run("moe", DFC)
    with monkeypatch.context() as patch:
        patch.setattr(derive.shutil, "copyfile", full)
        with pytest.raises(UserError, match=r"could not be written: .*No space left"):
            upcycle(new.chunks, plain, tmp_path / "new", DFC)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.incomplete").mkdir()
    (tmp_path / ".new.incomplete" / "of a process that was killed").touch()
    upcycle(new.chunks, plain, tmp_path / "new", DFC)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
    ]
    assert not (tmp_path / ".new.incomplete").exists()


def test_the_flag_is_no_part_of_other_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(from_residual=True))
    with pytest.raises(UserError, match="convert the checkpoint by `megatron-fc upcycle` first"):
        specs.from_args(None)


# Whole runs. ------------------------------------------------------------------------------------------------------


SHORT = ("train_iters=6", "lr_decay_iters=6", "save_interval=3", "eval_iters=1")


def upcycle_in_a_process(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [fork_server.python(), *launcher, "-m", "megatron_fc", "upcycle", *words]
    return subprocess.run(command, env=runs.environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """Checkpoints of a plain run at the iterations 3 and 6, of which 3 is said to be the last."""
    run_dir = config.parent / "residual"
    runs.train(config, run_dir, "connection=residual", *SHORT)
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "6"
    tracker.write_text("3")
    return run_dir


@pytest.mark.slow
def test_upcycled_run_goes_on_with_the_same_loss(config: Path, finished: Path) -> None:
    source, target = finished / "checkpoints", config.parent / "upcycled"
    done = upcycle_in_a_process("--from", str(source), "--to", str(target), str(config), *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"14 dfc_x4 tensors are missing in {source}/iter_0000003")
    assert done.stdout.count("\n") == 1
    assert (target / "iter_0000003").is_dir()

    summary = runs.train(config, config.parent / "goes_on", f"load={target}", *SHORT)
    plain, connected = read_metrics(finished).loss, read_metrics(config.parent / "goes_on").loss
    assert list(connected) == [4, 5, 6]
    assert connected[4] == plain[4]
    assert connected[6] != plain[6]
    assert summary["connection_parameters"] == 472

    trained = find_checkpoint(config.parent / "goes_on" / "checkpoints")
    with pytest.raises(UserError, match="is no identity any more"):
        to_residual(trained, config.parent / "back")
    residual = ("--to-residual", "--from", str(target), "--to", str(config.parent / "back"))
    assert upcycle_in_a_process(*residual).returncode == 0
    assert_same(tensors(find_checkpoint(config.parent / "back")), tensors(source / "iter_0000003"))


@pytest.mark.slow
@pytest.mark.parametrize(("connection", "worlds"), [("dhc", [2]), ("mhc", [1, 2])])
def test_a_wider_stream_goes_on_in_pipeline_stages(
    connection: str, worlds: list[int], config: Path, finished: Path
) -> None:
    """The plain run of one rank goes on with the same loss, and with the same random mapping in every layout."""
    source = finished / "checkpoints"
    words = ["train", str(config), *SHORT, "train_iters=4", "from_residual=true", f"load={source}"]
    words.append(f"connection={connection}")
    expected = read_metrics(finished).loss[4]
    connections = []
    for ranks in worlds:
        run_dir = config.parent / f"{connection}-{ranks}"
        layout = [f"pipeline_model_parallel_size={ranks}", f"run_dir={run_dir}"]
        assert harness.run("command_line", ranks, config.parent / f"{connection}-{ranks}-ranks", words + layout) == (
            [0] * ranks
        )
        rounding = 2e-6 if connection == "mhc" else 0.0
        assert read_metrics(run_dir).loss == {4: pytest.approx(expected, rel=0, abs=rounding)}
        stored = tensors(run_dir / "checkpoints" / "iter_0000003")
        connections.append({key: value for key, value in stored.items() if is_connection_key(key)})
        assert_same(
            {key: value for key, value in stored.items() if not is_connection_key(key)},
            tensors(source / "iter_0000003"),
        )
    assert_same(connections[0], connections[-1])


@pytest.mark.slow
def test_upcycling_under_another_layout(config: Path, finished: Path) -> None:
    source, target = finished / "checkpoints", config.parent / "two_stages"
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = ("--from", str(source), "--to", str(target), str(config), "pipeline_model_parallel_size=2")
    done = upcycle_in_a_process(*options, launcher=two)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = tensors(source / "iter_0000003")
    connected = tensors(target / "iter_0000003")
    assert_same({key: value for key, value in connected.items() if not is_connection_key(key)}, plain)
    beta = connected["decoder.layers.input_layernorm.connection.static_beta"]
    assert torch.equal(beta, torch.ones(2, 4))
    assert not connected["optimizer.state.exp_avg.decoder.layers.pre_mlp_layernorm.connection.static_beta"].any()


@pytest.mark.slow
def test_training_starts_from_a_plain_checkpoint(config: Path) -> None:
    """As a HybridModel in bf16; the second call goes on from the run's own checkpoints."""
    family = ("family=hybrid", "bf16=true", "eval_iters=1", "lr_decay_iters=6", "save_interval=3")
    plain = config.parent / "hybrid"
    runs.train(config, plain, "connection=residual", "train_iters=6", *family)
    source = plain / "checkpoints"

    run_dir = config.parent / "from_plain"
    start = ("from_residual=true", f"load={source}", "ckpt_step=3", *family)
    printed = runs.train(config, run_dir, "train_iters=4", *start)["printed"]
    assert "from_residual: 28 dfc_x4 tensors are missing in" in printed
    assert read_metrics(run_dir).loss == {4: read_metrics(plain).loss[4]}
    printed = runs.train(config, run_dir, "train_iters=6", *start)["printed"]
    assert "from_residual" not in printed
    assert list(read_metrics(run_dir).loss) == [4, 5, 6]
    events = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events if event["event"] == "start"] == [3, 4], (
        "ckpt_step was the plain run's"
    )
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "iter_0000006"


@pytest.mark.slow
def test_the_documented_config_for_a_loop_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(snippets("yaml")["docs/upcycle.md"][0])
    plain = (
        "connection=residual",
        "eval_interval=1",
        "eval_iters=0",
        "save_interval=1",
        f"run_dir={tmp_path / 'plain'}",
    )
    done = run(tmp_path, "train", tmp_path / "own.yaml", *plain)
    assert done.code == 0, done.printed
    source, target = tmp_path / "plain" / "checkpoints", tmp_path / "connected"
    done = run(tmp_path, "upcycle", "--from", source, "--to", target, tmp_path / "own.yaml")
    assert done.code == 0, done.printed
    assert difference(find_checkpoint(target), DFC, 64) is None
    assert "this run has plain residual connections" in (difference(find_checkpoint(target), None, 64) or "")


@pytest.mark.slow
def test_refused_start_leaves_nothing(config: Path, finished: Path) -> None:
    run_dir = config.parent / "refused"
    # A run that begins anew may change its model, as far as the weights of the checkpoint go into it.
    changed = ("qk_layernorm=false", "finetune=true")
    start = ("from_residual=true", f"load={finished / 'checkpoints'}", *changed, *SHORT)
    done = subprocess.run(
        runs.command(config, f"run_dir={run_dir}", *start),
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "k_layernorm.weight and 1 more, unknown to this model" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "CONFIG", "from_residual=true"], "from_residual needs the plain checkpoint to start from: set load"),
        (["train", "CONFIG", "from_residual=true", "load=PLAIN", "connection=residual"], "nothing to upcycle"),
        (["train", "CONFIG", "from_residual=true", "load=nowhere"], "nowhere holds no checkpoint"),
        (
            ["train", "CONFIG", "from_residual=true", "load=PLAIN", "connection=mfc"],
            "mfc_x4 is never the residual network: start it from random weights, or upcycle to dfc, dhc or mhc",
        ),
        (["upcycle", "--from", "PLAIN", "--to", "new", "CONFIG", "connection=mfc"], "mfc_x4 is never the residual"),
        (["train", "CONFIG", "load=PLAIN", "connection=dhc"], "plain residual connections, this run has dhc_x4 conn"),
        (["train", "CONFIG", "from_residual=7"], "from_residual is a switch: set it to true or false, not 7"),
        (["train", "CONFIG", "load=nowhere"], "load=nowhere holds no checkpoint"),
        (["upcycle", "--from", "nowhere", "--to", "new", "CONFIG"], "nowhere holds no checkpoint"),
        (["upcycle", "--from", "PLAIN", "--to", "PLAIN", "CONFIG"], "exists and is never overwritten"),
        (["upcycle", "--from", "PLAIN", "--to", "new", "CONFIG", "connection=residual"], "connection=residual"),
        (["upcycle", "--to-residual", "--from", "nowhere", "--to", "new"], "nowhere holds no checkpoint"),
    ],
)
def test_mistakes(
    config: Path,
    plain: Path,
    tmp_path: Path,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    places = {"CONFIG": str(config), "PLAIN": str(plain.parent), "load=PLAIN": f"load={plain.parent}"}
    words = [places.get(word, word) for word in words]
    assert main(words + (["run_dir=run"] if words[0] == "train" else [])) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

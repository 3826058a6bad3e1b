"""YAML -> Megatron's command line, and every way to get it wrong."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.cli.main import main
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import KINDS, overrides
from megatron_fc.data.indexed import write_indexed
from megatron_fc.megatron.flags import add_connection_args, is_connection_argument
from megatron_fc.training.machine import has_transformer_engine
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.recipe import CONNECTIONS, Recipe, load_recipe

BASE = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16, "swiglu": True},
    "connections": {"connection": "dfc", "rate": 4},
    "optimizer": {"train_iters": 3, "lr": 0.001, "micro_batch_size": 2, "bf16": False},
    "parallel": {"tensor_model_parallel_size": 2},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_indexed(tmp_path / "train", [[1, 2]] * 1000, 128, eod=0)
    data = {"data_path": [str(tmp_path / "train")], "tokenizer_type": "NullTokenizer", "vocab_size": 128}
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({**BASE, "data": data, "logging": {"run_dir": str(tmp_path / "run")}}))
    return path


def value(recipe: Recipe, flag: str) -> str:
    return recipe.argv[recipe.argv.index(flag) + 1]


def test_settings_become_megatrons_flags(base: Path) -> None:
    recipe = load_recipe(base)
    assert value(recipe, "--num-layers") == "2"
    assert value(recipe, "--lr") == "0.001"
    assert value(recipe, "--data-path") == str(base.parent / "train")
    assert "--swiglu" in recipe.argv
    assert "--bf16" not in recipe.argv
    assert recipe.connection == FracConfig(rate=4)
    assert value(recipe, "--frac-rate") == "4"
    assert "--save" not in recipe.argv, "no save_interval, nothing to save"


def test_lists_are_written_as_megatron_reads_them(base: Path) -> None:
    """Its parser has three ways: several words, square brackets, round ones."""
    words = ["window_size=[512,0]", "moe_layer_freq=[0, 1]", "num_experts=4", "recompute_modules=[mlp, moe]"]
    args = megatron_arguments().parse(load_recipe(base, words).argv)
    assert args.window_size == (512, 0)
    assert args.moe_layer_freq == [0, 1]
    assert args.recompute_modules == ["mlp", "moe"]
    assert megatron_arguments().parse(load_recipe(base, ["window_size=[-1,0]"]).argv).window_size == (-1, 0)


def test_overrides_find_their_section(base: Path) -> None:
    recipe = load_recipe(base, ["lr=2e-2", "optimizer.train_iters=7", "connection=residual", "save_interval=5"])
    assert value(recipe, "--lr") == "2e-2" or float(value(recipe, "--lr")) == 0.02
    assert value(recipe, "--train-iters") == "7"
    assert recipe.connection is None
    assert "--frac-rate" not in recipe.argv
    assert recipe.label == "residual"
    assert value(recipe, "--save") == value(recipe, "--load") == str(base.parent / "run" / "checkpoints")
    assert recipe.sections["optimizer"]["train_iters"] == 7


def test_connection_kinds_share_one_file(base: Path) -> None:
    ablation = ["connections.tanh=false", "connections.norm=none"]
    assert load_recipe(base, ablation).connection == FracConfig(rate=4, tanh=False, norm="none")
    assert load_recipe(base, [*ablation, "connection=sfc"]).connection == FracConfig(rate=4, dynamic=False)
    wide = load_recipe(base, [*ablation, "connection=dhc", "rate=2"])
    assert wide.connection == HyperConfig(slots=2, tanh=False, norm="none")
    constrained = load_recipe(base, [*ablation, "connection=mhc"])
    assert constrained.connection == ManifoldConfig(slots=4)
    assert "mhc_x4 does without norm=none, tanh=False" in constrained.notes
    assert "dfc_x4 does without leave=learned" in load_recipe(base, ["leave=learned"]).notes
    static = load_recipe(base, ["connection=sfc", "norm_eps=1.0e-5"]).notes
    assert not [note for note in static if "does without" in note], "a default of its kind"


@pytest.mark.parametrize(
    ("words", "connection", "flags"),
    [
        (["connection=shc", "rate=2"], HyperConfig(slots=2, dynamic=False), "--hyper-slots 2 --no-hyper-dynamic"),
        (["connection=dhc"], HyperConfig(slots=4), "--hyper-slots 4"),
        (["connection=dhc", "rate=8", "fractions=2"], HyperConfig(slots=8, fractions=2), "8 --hyper-fractions 2"),
        (["connection=dhc", "dynamic_beta=false"], HyperConfig(dynamic_beta=False), "4 --no-hyper-dynamic-beta"),
        (["connection=mhc", "leave=learned"], ManifoldConfig(leave="learned"), "4 --manifold-leave learned"),
        (["connection=mfc", "rate=2"], ManifoldConfig(slots=2, fractions=2), "2 --manifold-fractions 2"),
    ],
)
def test_members_of_the_family(base: Path, words: list[str], connection: ConnectionConfig, flags: str) -> None:
    recipe = load_recipe(base, words)
    assert recipe.connection == connection
    assert recipe.label == connection.label
    assert " ".join(recipe.argv).endswith(flags)
    assert recipe.backend == "torch"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["connection=dhc", "fractions=2", "tanh=false"], FracConfig()),
        (["connection=dhc", "fractions=2", "stream_layers=2"], ManifoldConfig()),
        (["connection=mhc", "leave=learned", "stream_layers=2"], FracConfig(rate=2)),
        (["connection=dfc", "recompute=true", "input_norm=projection"], HyperConfig(slots=4, fractions=2)),
    ],
)
def test_overrides_for_another_connection_are_accepted(base: Path, words: list[str], wanted: ConnectionConfig) -> None:
    """Those that `evaluate` and `convert` name for a checkpoint."""
    assert load_recipe(base, [*words, *overrides(wanted, load_recipe(base, words).connection)]).connection == wanted


def test_a_runs_own_setting_wins_over_the_machines(base: Path) -> None:
    assert value(load_recipe(base, ["num_workers=1"]), "--num-workers") == "1"


def test_extra_flags_come_last(base: Path) -> None:
    assert load_recipe(base, (), ["--lr", "0.5"]).argv[-2:] == ["--lr", "0.5"]


CONNECTION_FLAGS = sorted(
    option
    for action in add_connection_args(argparse.ArgumentParser(add_help=False))._actions
    if is_connection_argument(action.dest)
    for option in action.option_strings
)
SETTINGS = {
    "--frac-rate": "rate=8",
    "--frac-dynamic": "connection=dfc",
    "--no-frac-dynamic": "connection=sfc",
    "--no-frac-tanh": "tanh=false",
    "--frac-recompute": "recompute=true",
    "--hyper-slots": "rate=8",
    "--hyper-fractions": "fractions=8",
    "--no-hyper-dynamic": "connection=shc",
    "--manifold-slots": "rate=8",
    "--manifold-fractions": "connection=mfc",
    "--manifold-leave": "leave=8",
    "--frac-initial-scale": "initial_scale=8",
    "--from-residual": "from_residual=true",
}


def test_every_option_of_the_connection_is_a_flag() -> None:
    options = {f"--{kind}-{f.name.replace('_', '-')}" for kind, config in KINDS.items() for f in fields(config)}
    assert options < set(CONNECTION_FLAGS)
    assert set(SETTINGS) < set(CONNECTION_FLAGS)


@pytest.mark.parametrize("flag", CONNECTION_FLAGS)
def test_a_flag_is_no_second_source_of_the_connection(base: Path, flag: str) -> None:
    for connection in ("dfc", "residual"):
        for words in ([flag, "8"], [f"{flag}=8"]):
            with pytest.raises(UserError, match=f"^{flag} behind -- would be a second source of the conn") as refused:
                load_recipe(base, [f"connection={connection}"], ["--lr", "0.5", *words])
            assert SETTINGS.get(flag, "") in str(refused.value)


@pytest.mark.parametrize("words", [(["spec=[a.b, c]"], []), ([], ["--spec", "megatron_fc.megatron.specs", "dfc_x8"])])
def test_a_spec_is_no_second_source_of_the_connection(base: Path, words: tuple[list[str], list[str]]) -> None:
    with pytest.raises(UserError, match=r"^spec=\S+ \S+ would be a second source of the connection"):
        load_recipe(base, *words)


def test_gpt_layers_become_a_hybrid_pattern(base: Path) -> None:
    recipe = load_recipe(base, ["family=hybrid"])
    assert value(recipe, "--hybrid-layer-pattern") == "*-*-"
    assert "--num-layers" not in recipe.argv
    moe = load_recipe(base, ["family=hybrid", "num_experts=4", "moe_layer_freq='([0]+[1])'"])
    assert value(moe, "--hybrid-layer-pattern") == "*-*E"


@pytest.mark.parametrize(
    ("overrides", "extra", "sentence"),
    [
        (["num_layer=4"], [], "unknown key in section model: 'num_layer': did you mean 'num_layers'?"),
        (["conection=dfc"], [], "unknown key in section model: 'conection': did you mean 'connection'?"),
        (["connections.rat=2"], [], "unknown key in section connections: 'rat': did you mean 'rate'?"),
        (["optimizr.lr=1"], [], "unknown section 'optimizr': did you mean 'optimizer'?"),
        (["connection=dcf"], [], "unknown connection 'dcf': did you mean 'dfc'?"),
        (["family=mamba"], [], "unknown family 'mamba': valid are gpt, hybrid"),
        (["lr"], [], "'lr' is no override: write key=value"),
        (["rate=3"], [], "rate=3 does not divide hidden_size=64: choose a rate that does, for example 1, 2, 4, 8"),
        (["connection=mfc", "rate=3"], [], "mfc_x3: fractions=3 does not divide hidden_size=64: choose a number of fr"),
        (["rate=0"], [], "rate must be a whole number of at least 1, not 0"),
        (["connection=mhc", "rate=0"], [], "rate must be a whole number of at least 1, not 0: use 4"),
        (["connection=hc"], [], "unknown connection 'hc': did you mean '"),
        (["connection=hyper"], [], "'hyper': valid are dfc, dhc, mfc, mhc, residual, sfc, shc"),
        (["connection=dhc", "fractions=3"], [], "rate=4 is no multiple of fractions=3: use rate=6"),
        (["connection=dhc", "fractions=4"], [], "as many fractions as slots are a Frac-Connection: use dfc or sfc"),
        (["connection=dhc", "fractions=x"], [], "fractions must be a whole number of at least 1, not 'x': use 1"),
        (["fractions=2"], [], "fractions=2 is an option of shc and dhc: dfc_x4 has its own, drop it"),
        (["connection=mfc", "fractions=2"], [], "fractions=2 is an option of shc and dhc: mfc_x4 has its own"),
        (
            ["connection=dhc", "recompute=true"],
            [],
            "recompute=True is an option of sfc, dfc, which dhc does not have",
        ),
        (["slots=4"], [], "unknown key in section model: 'slots'"),
        (["connection=mhc", "leave=sum"], [], "unknown leave 'sum': valid are learned, mean"),
        ([], ["--hyper-slots", "4"], "--hyper-slots behind -- would be a second source of the connection"),
        (["tp=2"], [], "unknown key in section model: 'tp': write tensor_model_parallel_size"),
        (["model.nodes=8"], [], "unknown key in section model: 'nodes': it is an option of topology and launch/, --no"),
        (["num_layers=many"], [], "argument --num-layers: invalid int value: 'many'"),
        (["swiglu=3"], [], "swiglu is a switch: set it to true or false, not 3"),
        (["num_layers=true"], [], "num_layers takes a value, not true"),
        (["logging.lr=1"], [], "lr stands in the sections optimizer and logging: keep one"),
        (["model.run_dir=x"], [], "unknown key in section model: 'run_dir'"),
        (["data_path=[nowhere/train]"], [], "data_path=nowhere/train: nowhere/train.bin does not exist"),
        (["data_path=null"], [], "no data: set data_path"),
        (["tokenizer_model=no/such/dir"], [], "tokenizer_model=no/such/dir: no/such/dir does not exist"),
        ([], ["--lrr", "1"], "unknown Megatron flag --lrr: did you mean --lr?"),
        ([], ["stray"], "unexpected argument 'stray' among the Megatron flags"),
    ],
)
def test_wrong_input_is_one_sentence_exit_2_and_nothing_written(
    base: Path, overrides: list[str], extra: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(base.parent.rglob("*"))
    code = main(["train", str(base), *overrides, *(["--", *extra] if extra else [])])
    captured = capsys.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert captured.err.startswith("megatron-fc: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(base.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("modle: {}", "unknown section in .*: 'modle': did you mean 'model'"),
        ("- a list", "must hold the sections model, connections"),
        ("model: 3", "section model of .* must hold `name: value` lines, not 3"),
        ("model: {a: [", "is not valid YAML"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_recipe(path)


def test_a_file_in_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: {}\n# für\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml is not UTF-8, line 2 has a byte that is none: save it as UTF-8"):
        load_recipe(path)


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"cannot read the config nowhere\.yaml: No such file"):
        load_recipe(Path("nowhere.yaml"))


@pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is installed")
@pytest.mark.parametrize("override", ["transformer_impl=transformer_engine", "fp8_format=hybrid"])
def test_transformer_engine_asked_for_and_missing(base: Path, override: str) -> None:
    with pytest.raises(UserError, match=f"{override}.*Transformer Engine.* not installed: install it"):
        load_recipe(base, [override])


def test_dry_run_prints_a_command_that_parses_back(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(base), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "    --frac-rate 4" in printed
    assert "--num-layers 2 \\" in printed
    assert not (base.parent / "run").exists()


@pytest.mark.parametrize("config", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_resolve(config: Path, base: Path) -> None:
    prefix = base.parent / "train"
    files = [f"train_data_path=['{prefix}']", f"valid_data_path=['{prefix}']", f"tokenizer_model={base.parent}"]
    for connection in CONNECTIONS:
        load_recipe(config, [*files, f"connection={connection}"])


TWICE = {
    "optimizer:\n  lr: 1\n  lr: 2": "lr stands in the lines 2 and 3: keep one",
    "optimizer:\n  lr: 1\nmodel: {}\noptimizer:\n  min_lr: 2": "optimizer stands in the lines 1 and 4: keep one",
    "data:\n  data_path: [{a: 1, a: 2}]": "a stands in the lines 2 and 2: keep one",
}


@pytest.mark.parametrize("content", TWICE)
def test_a_key_or_section_that_stands_twice_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"bad\.yaml: {TWICE[content]}$"):
        load_recipe(path)


def test_defaults_that_a_file_merges_may_be_replaced(base: Path) -> None:
    content = yaml.safe_load(base.read_text())
    del content["optimizer"]
    merged = "optimizer:\n  <<: {train_iters: 3, micro_batch_size: 2, lr: 0.5}\n  <<: {min_lr: 0.1}\n  lr: 0.25\n"
    base.write_text(yaml.safe_dump(content) + merged)
    recipe = load_recipe(base)
    assert [value(recipe, flag) for flag in ("--lr", "--min-lr", "--train-iters")] == ["0.25", "0.1", "3"]


def test_a_path_may_begin_in_a_home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    content = yaml.safe_load(base.read_text())
    content["data"]["data_path"] = [1, "~/train"]
    base.write_text(yaml.safe_dump(content))
    recipe = load_recipe(base, ["run_dir=~/elsewhere", "data_cache_path=~"])
    assert recipe.run_dir == base.parent / "elsewhere"
    assert recipe.sections["data"]["data_path"] == [1, f"{base.parent}/train"]
    assert value(recipe, "--tensorboard-dir") == f"{base.parent}/elsewhere/tensorboard"
    for word, sentence in {
        "run_dir=~nobody-here/x": "run_dir=~nobody-here/x names a home folder that is not here",
        "run_dir=$SCRATCH/x": r"run_dir=\$SCRATCH/x begins with a variable, which only a shell knows",
        "data_path=['${DATA}/train']": r"data_path=\$\{DATA\}/train begins with a variable",
    }.items():
        with pytest.raises(UserError, match=f"^{sentence}"):
            load_recipe(base, [word])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("perturbation=often", "perturbation='often' is no whole number: give 1, 2, 3 ... or null"),
        ("log_residual_gain=3", "log_residual_gain is a switch: set it to true or false, not 3"),
    ],
)
def test_what_goes_along_is_checked(base: Path, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(base, [word])
    recipe = load_recipe(base, ["perturbation=2", "log_residual_gain=true"])
    assert (recipe.perturbation, recipe.log_residual_gain) == (2, True)
    # Plain residuals have no gain to log.
    assert not load_recipe(base, ["log_residual_gain=true", "connection=residual"]).log_residual_gain

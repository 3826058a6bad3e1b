"""The command line as a whole; `train` has its tests in tests/megatron."""

from pathlib import Path

import pytest

from megatron_fc.cli import compare, main, train


@pytest.mark.parametrize(
    "words", [["train", "c.yaml", "a=1", "--dry-run", "b=2"], ["train", "--dry-run", "c.yaml", "a=1", "b=2"]]
)
def test_overrides_and_options_in_any_order(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(train, "run", lambda args: seen.append((args.config, args.overrides, args.dry_run)) or 0)
    assert main.main(words) == 0
    assert seen == [(Path("c.yaml"), ["a=1", "b=2"], True)]


def test_megatron_flags_after_two_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(train, "run", lambda args: seen.append((args.overrides, args.megatron_flags)) or 0)
    assert main.main(["train", "c.yaml", "a=1", "--", "--lr", "1", "--", "x"]) == 0
    assert seen == [(["a=1"], ["--lr", "1", "--", "x"])]


def test_a_path_behind_an_option_may_begin_in_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behind `=` no shell completes it, and a folder named ~ would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[object] = []
    monkeypatch.setattr(compare, "run", lambda args: seen.append((args.runs, args.plot)) or 0)
    assert main.main(["compare", "~/a", "b", "--plot=~/c.png"]) == 0
    assert seen == [([tmp_path / "a", Path("b")], tmp_path / "c.png")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "c.yaml", "--dry"], "unknown option of train '--dry': "),
        (
            ["data", "tokenize", "x", "--out=y", "--tokenizer=z", "--field=body"],
            "unknown option of data '--field': did you mean '--text-field'?",
        ),
        (["train", "c.yaml", "-x"], "unrecognized arguments: -x"),
        (
            ["data", "tokenize", "x", "--out=y", "--tokenizer=z", "--eos=", "--no-eos"],
            "not allowed with argument --eos",
        ),
        (["doctor", "stray"], "unrecognized arguments: stray"),
        (["doctor", "--", "--lr", "1"], "only `train` takes Megatron flags after --"),
    ],
)
def test_usage_errors(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(words)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("said", "sentence"), [((), "interrupted"), (("at step 7",), "at step 7")])
def test_an_interrupt_says_so(
    said: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(train, "run", run)
    assert main.main(["train", "c.yaml"]) == 130
    assert capsys.readouterr().err == f"megatron-fc: {sentence}\n"

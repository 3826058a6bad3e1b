import json
import shutil
from pathlib import Path

import pytest

from megatron_fc.data.blend import blend, count
from megatron_fc.errors import UserError
from support.documents import make, save_tokenizer, texts, write_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `a`, two tasks and a validation split, `b`, `other`, of another tokenizer, and `cut`."""
    root = tmp_path_factory.mktemp("blend")
    for name, size in (("small", 300), ("large", 320)):
        save_tokenizer(root / name, size)
    for name, number in (("a", 300), ("b", 200)):
        for half in "xy":
            write_documents(root / f"in_{name}" / f"{half}.jsonl", texts(number, seed=ord(half) + number))
    make([root / "in_a"], root / "a", root / "small", validation=0.1)
    make([root / "in_b"], root / "b", root / "small", tasks=1)
    make([root / "in_b"], root / "other", root / "large")
    shutil.copytree(root / "a", root / "cut")
    (root / "cut" / "train-00001.bin").write_bytes(b"")
    return root


def tokens(folder: Path, split: str = "train") -> dict[str, int]:
    files = json.loads((folder / "manifest.json").read_text())["files"][split]
    return {str(folder / file["prefix"]): file["tokens"] for file in files}


def written(out: Path, split: str = "train") -> dict[str, float]:
    words = json.loads(out.read_text())[split]
    return {prefix: float(weight) for weight, prefix in zip(words[::2], words[1::2], strict=True)}


def blended(made: Path, out: Path, *names: str, **options: object) -> list[str]:
    said: list[str] = []
    settings = {"weights": None, "mix": None, "tokens": None, "max_epochs": 4.0} | options
    blend([str(made / name) for name in names], out, report=said.append, **settings)  # type: ignore[arg-type]
    return said


def test_weights_are_shared_by_the_tokens_of_the_files(made: Path, tmp_path: Path) -> None:
    table, note, _ = blended(made, tmp_path / "blend.json", "a", "b/manifest.json", weights=[0.3, 0.7])

    a, b = tokens(made / "a"), tokens(made / "b")
    wanted = {prefix: 0.3 * size / sum(a.values()) for prefix, size in a.items()}
    wanted |= dict.fromkeys(b, 0.7)
    assert written(tmp_path / "blend.json") == pytest.approx(wanted, rel=1e-9)
    assert set(written(tmp_path / "blend.json", "valid")) == set(tokens(made / "a", "valid"))
    assert note == "note: no validation data in b"
    assert json.loads((tmp_path / "blend.json").read_text())["test"] is None
    everything = sum(a.values()) + sum(b.values())
    assert f"{0.3 * everything / sum(a.values()):.2f}" in table
    assert f"{0.7 * everything / sum(b.values()):.2f}" in table


def test_natural_shares_read_each_equally_often(made: Path, tmp_path: Path) -> None:
    blended(made, tmp_path / "blend.json", "a", "b", tokens=20_000)
    sizes = tokens(made / "a") | tokens(made / "b")
    shares = {prefix: size / sum(sizes.values()) for prefix, size in sizes.items()}
    assert written(tmp_path / "blend.json") == pytest.approx(shares, rel=1e-9)


def test_a_published_mix_gives_the_shares(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("sources:\n  web: {tokens: 3T}\n  code: {tokens: 1T}\n")
    manifests = [f"code={made / 'b'}", f"web={made / 'a'}"]
    settings = {"weights": None, "tokens": None, "max_epochs": 4.0, "report": lambda line: None}
    blend(manifests, tmp_path / "blend.json", mix=tmp_path / "mix.yaml", **settings)
    shares = written(tmp_path / "blend.json")
    assert sum(shares[prefix] for prefix in tokens(made / "a")) == pytest.approx(0.75)
    with pytest.raises(UserError, match="has no manifest for code: give code=FOLDER"):
        blend(manifests[1:], tmp_path / "blend.json", mix=tmp_path / "mix.yaml", **settings)
    with pytest.raises(UserError, match="unknown source of the mix 'cod': did you mean 'code'"):
        blend(["cod=x"], tmp_path / "blend.json", mix=tmp_path / "mix.yaml", **settings)
    with pytest.raises(UserError, match="a source of the mix is named twice"):
        blend([*manifests, "web=x"], tmp_path / "blend.json", mix=tmp_path / "mix.yaml", **settings)
    (tmp_path / "mix.yaml").write_text("sources:\n  web: {tokens: many}\n")
    with pytest.raises(UserError, match=r"mix\.yaml: web\.tokens=many: give a number"):
        blend(manifests, tmp_path / "blend.json", mix=tmp_path / "mix.yaml", **settings)


def test_what_is_no_blend_is_refused(made: Path, tmp_path: Path) -> None:
    for names, said, options in [
        (("a", "b"), r"--weights add up to 0\.9, and must to 1", {"weights": [0.5, 0.4]}),
        (("a", "b"), r"b is -0\.5, and must be above 0", {"weights": [1.5, -0.5]}),
        (("a", "b"), r"--weights has 1 numbers for 2 data sets", {"weights": [1.0]}),
        (("a", "a/manifest.json"), r"named twice", {"weights": [0.5, 0.5]}),
        (("a", "other"), r"other was made with the tokenizer large, and .* with another one, small", {}),
        (("a", "b"), r"a would be read \d+\.\d+ times, and --max-epochs is 4", {"tokens": 10**9}),
        (("nothing",), r"the manifest .*nothing cannot be read", {}),
        (("a", "b"), r"--max-epochs=nan: give a number above 0", {"max_epochs": float("nan")}),
        (("a", "cut"), r"train-00001\.bin has 0 bytes, and .* by manifest\.json beside it", {}),
    ]:
        with pytest.raises(UserError, match=said):
            blended(made, tmp_path / "blend.json", *names, **options)
    assert not (tmp_path / "blend.json").exists()
    with pytest.raises(UserError, match=r"--out=\S+ cannot be written: Is a directory"):
        blended(made, tmp_path, "a", "b")


def test_published_mixes_have_the_published_totals() -> None:
    import yaml

    for name, total in (("olmoe_mix", 4.07e12), ("olmo2_mix", 3.90e12)):
        path = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
        sources = yaml.safe_load(path.read_text())["sources"]
        assert sum(count(source["tokens"]) for source in sources.values()) == pytest.approx(total, abs=5e9)


@pytest.mark.parametrize(("words", "number"), [("3T", 3 * 10**12), ("57.2B", 57_200_000_000), ("1_000", 1000)])
def test_numbers_of_tokens(words: str, number: int) -> None:
    assert count(words) == number


@pytest.mark.parametrize("words", ["", "T", "-3T", "nan", "3X"])
def test_what_is_no_number_of_tokens_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="give a number"):
        count(words)

"""`megatron-fc data blend`: data sets and their shares as the file that `per_split_data_args_path` takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_fc.data.job import SPLITS, write_json
from megatron_fc.errors import UserError, unknown
from megatron_fc.training.manifests import folder_of, read_manifest, refuse_other_sizes

_ROUNDING = 1e-3  # of weights that are written with a few digits


@dataclass(frozen=True)
class Share:
    """A data set in a blend.

    Attributes:
        folder: of its manifest.
        manifest: what that says.
        weight: share of the tokens that a run reads.
    """

    folder: Path
    manifest: dict[str, Any]
    weight: float

    @property
    def tokens(self) -> int:
        """For training, read once."""
        return sum(file["tokens"] for file in self.manifest["files"]["train"])


def blend(
    manifests: Sequence[str],
    out: Path,
    *,
    weights: Sequence[float] | None,
    mix: Path | None,
    tokens: int | None,
    max_epochs: float,
    report: Callable[[str], None],
) -> None:
    """Write the blend, and show it as a table.

    Args:
        manifests: paths of them or of their folders; with `mix`, NAME=PATH for each of its sources.
        weights: share of each, which add up to 1; None: their sizes are the shares, each is read equally often.
        mix: YAML with published sizes, which are the shares.
        tokens: that a run reads; None: as many as the data have.
        max_epochs: how often a data set may be read.

    Raises:
        UserError: shares are none, manifests do not fit each other, or a data set would be read too often.
    """
    if mix is not None:
        manifests, weights = _of_mix(mix, manifests)
    if not max_epochs > 0:
        raise UserError(f"--max-epochs={max_epochs:g}: give a number above 0")
    folders = [folder_of(Path(path)).resolve() for path in manifests]
    if len(set(folders)) != len(folders):
        raise UserError("a manifest is named twice: add its weights up")
    read = [read_manifest(folder) for folder in folders]
    sizes = [sum(file["tokens"] for file in manifest["files"]["train"]) for manifest in read]
    for folder, size in zip(folders, sizes, strict=True):
        if not size:
            raise UserError(f"{folder} has no token for training: leave it out")
    shares = [size / sum(sizes) for size in sizes] if weights is None else _checked(weights, folders)
    blended = [Share(*parts) for parts in zip(folders, read, shares, strict=True)]
    _refuse_other_tokenizers(blended)
    for share in blended:
        for file in (file for split in SPLITS for file in share.manifest["files"][split]):
            refuse_other_sizes(str(share.folder / file["prefix"]), file)
    budget = tokens if tokens is not None else sum(sizes)
    report(_table(blended, budget))
    for share in blended:
        if (epochs := share.weight * budget / share.tokens) > max_epochs + _ROUNDING:
            raise UserError(
                f"{share.folder} would be read {epochs:.2f} times, and --max-epochs is {max_epochs:g}: give it a "
                f"smaller weight, fewer --tokens, or a larger limit"
            )
    try:
        write_json(out, {**{split: _words(blended, split) for split in SPLITS}, "test": None})
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    if without := [share.folder.name for share in blended if not share.manifest["files"]["valid"]]:
        report(f"note: no validation data in {', '.join(without)}")
    report(f"train with: per_split_data_args_path={out.resolve()} tokenizer_model={folders[0] / 'tokenizer'}")


def count(words: str, setting: str = "--tokens") -> int:
    """Return a number of tokens: 3T, 57.2B, 5_000_000."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(words[-1:].upper(), 0)
    try:
        number = float(words[:-1] if factor else words) * (factor or 1)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1):
        raise UserError(f"{setting}={words}: give a number, e.g. 3T, 57.2B or 5000000")
    return round(number)


def _of_mix(mix: Path, words: Sequence[str]) -> tuple[list[str], list[float]]:
    """Manifests of a published mix in its order, and their weights by its sizes."""
    import yaml

    try:
        sources = yaml.safe_load(mix.read_text("utf-8"))["sources"]
        published = {name: count(str(said["tokens"]), f"{mix}: {name}.tokens") for name, said in sources.items()}
    except OSError as error:
        raise UserError(f"--mix={mix} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"--mix={mix} must have sources, each with its tokens") from None
    given = dict(word.partition("=")[::2] for word in words)
    if len(given) != len(words):
        raise UserError("a source of the mix is named twice: leave one out")
    for name in given:
        if name not in published:
            raise UserError(unknown("source of the mix", name, published))
    if missing := [name for name in published if name not in given]:
        raise UserError(f"--mix={mix} has no manifest for {', '.join(missing)}: give {missing[0]}=FOLDER")
    return [given[name] for name in published], [size / sum(published.values()) for size in published.values()]


def _checked(weights: Sequence[float], folders: Sequence[Path]) -> list[float]:
    if len(weights) != len(folders):
        raise UserError(f"--weights has {len(weights)} numbers for {len(folders)} data sets: give one for each")
    for weight, folder in zip(weights, folders, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"--weights: that of {folder} is {weight:g}, and must be above 0: leave the data set out")
    if abs(sum(weights) - 1) > _ROUNDING:
        raise UserError(f"--weights add up to {sum(weights):g}, and must to 1: they are shares of the tokens")
    return [weight / sum(weights) for weight in weights]


def _refuse_other_tokenizers(shares: Sequence[Share]) -> None:
    first = shares[0]
    for share in shares[1:]:
        if share.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{share.folder} was made with the tokenizer {share.manifest['tokenizer']['name']}, and {first.folder} "
                f"with another one, {first.manifest['tokenizer']['name']}: make one of them again"
            )


def _words(shares: Sequence[Share], split: str) -> list[str] | None:
    """Weights and prefixes by turns, as Megatron takes them; files share their data set's weight by their tokens."""
    words: list[str] = []
    for share in shares:
        files = share.manifest["files"][split]
        whole = sum(file["tokens"] for file in files)
        for file in files:
            words += [f"{share.weight * file['tokens'] / whole:.12g}", str(share.folder / file["prefix"])]
    return words or None


def _table(shares: Sequence[Share], budget: int) -> str:
    table = Table(title=f"Blend of {budget:,} tokens")
    for column in ("data set", "weight", "tokens", "read", "epochs"):
        table.add_column(column, justify="left" if column == "data set" else "right")
    for share in shares:
        read = share.weight * budget
        table.add_row(
            share.folder.name, f"{share.weight:.4f}", f"{share.tokens:,}", f"{read:,.0f}", f"{read / share.tokens:.2f}"
        )
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()

"""A suite's file: a config, variants of it, seeds, and the variant that the others are compared with.

::

    config: ../demo.yaml               # beside this file
    overrides: {train_iters: 180}      # of every run
    seeds: [11, 12, 13, 14, 15]
    baseline: residual
    variants:
      residual: {connection: residual}
      dfc_x4: {connection: dfc, rate: 4}
      dfc_x2: {connection: dfc, rate: 2, seeds: 3}

Keys of a variant are settings of `megatron-fc train`, but for `seeds` (it takes the first so many), `copies` (so many
further runs of the first seed, whose first weights are moved by 1e-7 of themselves) and `against` (its own baseline).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_fc.errors import UserError, unknown
from megatron_fc.training.strict_yaml import StrictLoader

# Of runs' folders and records, and of words of commands.
_NAME = re.compile(r"[\w+-][\w.+-]*")
_OWN = ("seed", "perturbation", "run_dir")
_MOST_SEED = 2**31 - 1
_KEYS = ("config", "overrides", "seeds", "baseline", "variants", "half_width", "keep_checkpoints_of")
_NEEDED = ("config", "seeds", "baseline", "variants")
HALF_WIDTH = 0.02


@dataclass(frozen=True)
class Variant:
    """What is varied.

    Attributes:
        settings: `key=value` for its runs.
        seeds: of its runs.
        copies: of its first seed, perturbed.
        against: the variant that it is compared with.
    """

    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    copies: int
    against: str


@dataclass(frozen=True)
class Run:
    """One run of a suite; copy 0 is the run itself, the others are its perturbed copies."""

    variant: str
    seed: int
    copy: int = 0

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}" + (f"-copy{self.copy}" if self.copy else "")


@dataclass(frozen=True)
class Suite:
    """A suite, checked.

    Attributes:
        file: that it was read from.
        config: of all runs.
        settings: `key=value` for all runs.
        variants: by name.
        baseline: name of the variant that the others are compared with, unless they name another.
        half_width: of an interval that is small enough to decide.
        keep_checkpoints_of: seeds whose runs keep their checkpoints when they have finished, None for all.
    """

    file: Path
    config: Path
    settings: tuple[str, ...]
    variants: dict[str, Variant]
    baseline: str
    half_width: float
    keep_checkpoints_of: frozenset[int] | None

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def runs(self) -> list[Run]:
        """All runs: seed by seed, so that what is there after an interruption can be compared."""
        seeds = dict.fromkeys(seed for variant in self.variants.values() for seed in variant.seeds)
        runs = [Run(name, seed) for seed in seeds for name, of in self.variants.items() if seed in of.seeds]
        copies = ((name, of, copy) for name, of in self.variants.items() for copy in range(1, of.copies + 1))
        return runs + [Run(name, of.seeds[0], copy) for name, of, copy in copies]

    def chosen(self, variants: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Return the runs of some variants and seeds; of all where none are named.

        Raises:
            UserError: the suite does not have one.
        """
        for name in variants:
            if name not in self.variants:
                raise UserError(unknown(f"variant of {self.file}:", name, self.variants))
        known = {run.seed for run in self.runs}
        for seed in seeds:
            if seed not in known:
                raise UserError(f"seed {seed} is none of {self.file}: it has {', '.join(map(str, sorted(known)))}")
        found = [
            run for run in self.runs if (not variants or run.variant in variants) and (not seeds or run.seed in seeds)
        ]
        if not found:
            raise UserError(
                f"{' and '.join(variants)} of {self.file} has no run of seed {' or '.join(map(str, seeds))}: give "
                f"another seed"
            )
        return found

    def settings_of(self, run: Run) -> list[str]:
        """`key=value` words of a run; later ones win."""
        perturbed = [f"perturbation={run.copy}"] if run.copy else []
        return [*self.settings, *self.variants[run.variant].settings, f"seed={run.seed}", *perturbed]


def read_suite(file: Path, overrides: Sequence[str] = (), baseline: str | None = None) -> Suite:
    """Read a suite.

    Args:
        file: of the suite.
        overrides: `key=value` for all runs, which win over the file's.
        baseline: in place of the file's.

    Raises:
        UserError: the file is no suite, names a variant or key that it does not have, or lacks seeds of a baseline.
    """
    content = _content(file)
    for key in content:
        if key not in _KEYS:
            raise UserError(unknown(f"key of {file}:", str(key), _KEYS))
    if missing := [key for key in _NEEDED if not content.get(key)]:
        raise UserError(f"{file} lacks {' and '.join(missing)}: a suite has {', '.join(_NEEDED)}")
    seeds = _seeds(file, content["seeds"], "seeds")
    baseline = baseline or str(content["baseline"])
    described = _mapping(file, "variants", content["variants"])
    variants = {str(name): _variant(file, str(name), of, seeds, baseline) for name, of in described.items()}
    kept = content.get("keep_checkpoints_of")
    suite = Suite(
        file,
        file.parent / str(content["config"]),
        (*_settings(_mapping(file, "overrides", content.get("overrides") or {})), *overrides),
        variants,
        baseline,
        _half_width(file, content.get("half_width", HALF_WIDTH)),
        None if kept is None else _kept(file, kept, seeds),
    )
    _refuse_own_settings(suite, overrides)
    _refuse_lacking_baselines(suite)
    return suite


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(), StrictLoader)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the suite {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    return _mapping(file, "a suite", content)


def _mapping(file: Path, what: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{file}: {what} must hold `name: value` lines, not {content!r}")
    return content


def _seeds(file: Path, content: Any, key: str) -> tuple[int, ...]:
    seeds = content if isinstance(content, list) else [content]
    if any(not isinstance(seed, int) or isinstance(seed, bool) or not 1 <= seed <= _MOST_SEED for seed in seeds):
        raise UserError(
            f"{file}: {key} must be whole numbers from 1 to {_MOST_SEED}, not {content!r}: write e.g. {key}: [1, 2, 3]"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{file}: {key} {content!r} names one twice: keep one")
    return tuple(seeds)


def _half_width(file: Path, content: Any) -> float:
    is_number = isinstance(content, (int, float)) and not isinstance(content, bool)
    if not is_number or not math.isfinite(content) or content <= 0:
        raise UserError(f"{file}: half_width={content!r} must be a loss above 0, e.g. {HALF_WIDTH}")
    return float(content)


def _kept(file: Path, content: Any, seeds: tuple[int, ...]) -> frozenset[int]:
    kept = _seeds(file, content, "keep_checkpoints_of")
    if other := [seed for seed in kept if seed not in seeds]:
        raise UserError(
            f"{file}: keep_checkpoints_of names seed {other[0]}, which is none of the suite: the checkpoints of all "
            f"others are deleted, so give some of {', '.join(map(str, seeds))}, or [] to keep none"
        )
    return frozenset(kept)


def _variant(file: Path, name: str, content: Any, seeds: tuple[int, ...], baseline: str) -> Variant:
    if not _NAME.fullmatch(name):
        raise UserError(f"{file}: {name!r} names folders of runs: call the variant by letters, digits and -_.+")
    values = dict(_mapping(file, name, content))
    count, copies = values.pop("seeds", len(seeds)), values.pop("copies", 0)
    for key, value, least, most in (("seeds", count, 1, len(seeds)), ("copies", copies, 0, 1000)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{file}: {key}={value!r} of {name} must be a number from {least} to {most}")
    against = str(values.pop("against", baseline))
    return Variant(tuple(_settings(values)), seeds[:count], copies, against)


def _settings(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _refuse_own_settings(suite: Suite, overrides: Sequence[str]) -> None:
    """An override that a variant would undo does not do what it says."""

    def key(word: str) -> str:
        return word.partition("=")[0].rpartition(".")[2]

    for word in [*suite.settings, *(word for variant in suite.variants.values() for word in variant.settings)]:
        if key(word) in _OWN:
            raise UserError(f"{word} is the suite's own to set: drop it")
    for word in overrides:
        for name, variant in suite.variants.items():
            if key(word) in map(key, variant.settings):
                raise UserError(f"{word} is what {name} of {suite.file} sets itself: drop it, or change the file")


def _refuse_lacking_baselines(suite: Suite) -> None:
    for name, variant in suite.variants.items():
        if variant.against not in suite.variants:
            raise UserError(unknown(f"baseline of {name} in {suite.file}:", variant.against, suite.variants))
        base = suite.variants[variant.against]
        if lacking := [seed for seed in variant.seeds if seed not in base.seeds]:
            raise UserError(
                f"{suite.file}: {name} has seed {lacking[0]}, which its baseline {variant.against} lacks: give the "
                f"baseline as many seeds, or {name} `seeds: {len(base.seeds)}`"
            )

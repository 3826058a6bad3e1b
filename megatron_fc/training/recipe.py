"""A run's YAML file -> the Megatron command line that it stands for.

The sections are for the reader: any of Megatron's arguments may stand in any of them, under its own name with
underscores. These names are ours: `model.family` (gpt or hybrid), `optimizer.precision`, `logging.run_dir`,
`checkpoint.keep_last`, `keep_every` and `on_damage`, and the section `frac` (`connection`: residual, sfc or dfc,
`from_residual`, and the fields of FracConfig).
"""

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_fc.checkpoints.resume import ON_DAMAGE
from megatron_fc.checkpoints.retention import Retention
from megatron_fc.connections.backend import backend_on
from megatron_fc.connections.config import FracConfig
from megatron_fc.errors import UserError, unknown
from megatron_fc.megatron.flags import add_frac_args, frac_flags
from megatron_fc.training import cpu_lane
from megatron_fc.training.machine import adaptations, device_capability, has_transformer_engine
from megatron_fc.training.precision import apply_precision, refuse_impossible, refuse_on_device

SECTIONS = ("model", "frac", "data", "optimizer", "parallel", "checkpoint", "logging")
CONNECTIONS = ("residual", "sfc", "dfc")
FAMILIES = ("gpt", "hybrid")
_OWN = {
    "family": "model",
    "precision": "optimizer",
    "run_dir": "logging",
    "keep_last": "checkpoint",
    "keep_every": "checkpoint",
    "on_damage": "checkpoint",
}
_DATA_KEYS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


@dataclass
class Recipe:
    """A run, resolved and checked.

    Attributes:
        sections: the YAML after overrides, as it is kept in the run's summary.
        frac: options of the connections, None for plain residuals.
        family: gpt or hybrid.
        run_dir: folder of everything that the run writes.
        argv: Megatron's command line, our flags included.
        backend: triton or torch; None for plain residuals, or where only the machines of the run can tell.
        on_damage: what to do with a damaged checkpoint, one of `resume.ON_DAMAGE`.
        retention: which checkpoints stay, None for all.
        notes: what was chosen for this machine, one sentence each.
    """

    sections: dict[str, dict[str, Any]]
    frac: FracConfig | None
    family: str
    run_dir: Path
    argv: list[str]
    backend: str | None
    on_damage: str
    retention: Retention | None
    notes: list[str] = field(default_factory=list)

    @property
    def connection(self) -> str:
        """The kind of connection as tables show it: residual, sfc_x4, dfc_x4 ..."""
        return "residual" if self.frac is None else self.frac.label


def load_recipe(
    path: Path, overrides: Sequence[str] = (), extra: Sequence[str] = (), *, elsewhere: bool = False
) -> Recipe:
    """Read a YAML file, apply `key=value` overrides and extra Megatron flags, check all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value` or `key=value`, the value in YAML's notation.
        extra: Megatron flags appended as they are; they win over the file.
        elsewhere: the run is for other machines: nothing is adapted to this one, and its files are not looked for.

    Raises:
        UserError: a name is unknown (the nearest valid one is given), a value is wrong, a file is missing, or the
            machine lacks what the run asks for. Nothing has been written then.
    """
    megatron = _MegatronArguments()
    sections = _read(path)
    known = megatron.names() | set(_OWN)
    for section, values in sections.items():
        for key in values:
            _check_name(section, key, known)
    for override in overrides:
        _override(sections, override, known)
    _refuse_repeated_names(sections)

    frac = _frac_config(sections["frac"])
    family, run_dir, settings = _split(sections, path)
    on_damage = settings.pop("on_damage", "refuse")
    if on_damage not in ON_DAMAGE:
        raise UserError(unknown("on_damage", str(on_damage), ON_DAMAGE))
    retention = Retention.from_settings(settings)
    if family == "hybrid":
        _set_hybrid_pattern(settings)
    apply_precision(settings)
    if frac is not None and "hidden_size" in settings:
        frac.slot_width(int(settings["hidden_size"]))
    notes, backend = [], None
    if not elsewhere:
        _refuse_missing_te(settings)
        notes = _adapt_to_machine(settings)
    if frac is not None and not elsewhere:
        backend, reason = backend_on(frac.backend, frac.rate, "cpu" if cpu_lane.needed() else "cuda")
        notes.append(f"Frac-Connections run on {backend}: {reason}")
    _set_run_paths(settings, run_dir)
    argv = [*megatron.flags(settings), *(frac_flags(frac) if frac else []), *_from_residual(sections["frac"]), *extra]
    args = megatron.parse(argv)
    refuse_impossible(args)
    if not elsewhere:
        refuse_on_device(args, device_capability())
        refuse_missing_files(args)
    return Recipe(sections, frac, family, run_dir, argv, backend, on_damage, retention, notes)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"Megatron's arguments: {message}")


class _MegatronArguments:
    """What Megatron's own parser knows of its arguments."""

    def __init__(self) -> None:
        from megatron.training.arguments import add_megatron_arguments

        # Abbreviations would let a typo through as another argument.
        self._parser = add_frac_args(add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False)))
        self._actions = {
            option.removeprefix("--").replace("-", "_"): (option, action)
            for action in self._parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }

    def names(self) -> set[str]:
        return {name for name in self._actions if not name.startswith(("frac_", "no_frac_"))}

    def flags(self, settings: dict[str, Any]) -> list[str]:
        """Write settings as flags; None and False leave an argument unset, a list becomes several values."""
        return [word for name, value in settings.items() for word in self._flag(name, value)]

    def _flag(self, name: str, value: Any) -> list[str]:
        option, action = self._actions[name]
        takes_value = action.nargs != 0
        if value is None:
            return []
        if not takes_value:
            if not isinstance(value, bool):
                raise UserError(f"{name} is a switch: set it to true or false, not {value!r}")
            negative = f"--no-{option.removeprefix('--')}"
            if not value and negative in action.option_strings:
                return [negative]
            return [option] if value else []
        if isinstance(value, bool):
            raise UserError(f"{name} takes a value, not {str(value).lower()}")
        if isinstance(value, (list, tuple)) and action.nargs is not None:
            return [option, *map(str, value)]
        return [option, str(value)]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self._parser.parse_known_args(list(argv))
        flags = [word.split("=")[0] for word in rest if word.startswith("--")]
        if flags:
            near = difflib.get_close_matches(flags[0], self._parser._option_string_actions, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown Megatron flag {flags[0]}{hint}")
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r} among the Megatron flags")
        return args


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the sections {', '.join(SECTIONS)}")
    for section, values in content.items():
        if section not in SECTIONS:
            raise UserError(unknown(f"section in {path}:", str(section), SECTIONS))
        if not isinstance(values, dict):
            raise UserError(f"section {section} of {path} must hold `name: value` lines, not {values!r}")
    return {section: dict(content.get(section) or {}) for section in SECTIONS}


def _frac_names() -> list[str]:
    return ["connection", "from_residual", *(f.name for f in fields(FracConfig) if f.name != "dynamic")]


def _check_name(section: str, key: str, known: set[str]) -> None:
    if section == "frac":
        if key not in _frac_names():
            raise UserError(unknown("key in section frac:", key, _frac_names()))
    elif key not in known or _OWN.get(key, section) != section:
        raise UserError(unknown(f"key in section {section}:", key, known))


def _override(sections: dict[str, dict[str, Any]], override: str, known: set[str]) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is no override: write key=value, and Megatron flags after --")
    section, dot, key = name.rpartition(".")
    if dot and section not in SECTIONS:
        raise UserError(unknown("section", section, SECTIONS))
    if not dot:
        section = _section_of(key, sections)
    _check_name(section, key, known)
    try:
        sections[section][key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value of {override!r} is not valid YAML: quote it") from None


def _section_of(key: str, sections: dict[str, dict[str, Any]]) -> str:
    """Where a bare key stands already, else its natural place."""
    for section, values in sections.items():
        if key in values:
            return section
    return _OWN.get(key, "frac" if key in _frac_names() else "model")


def _refuse_repeated_names(sections: dict[str, dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for section, values in sections.items():
        for key in values:
            if key in seen and "frac" not in (section, seen[key]):
                raise UserError(f"{key} stands in the sections {seen[key]} and {section}: keep one")
            seen[key] = section


def _frac_config(values: dict[str, Any]) -> FracConfig | None:
    connection = values.get("connection", "dfc")
    if connection not in CONNECTIONS:
        raise UserError(unknown("connection", str(connection), CONNECTIONS))
    options = {key: value for key, value in values.items() if key not in ("connection", "from_residual")}
    if connection == "residual":
        return None
    if connection == "sfc":
        # One override turns a DFC file into its SFC twin: what only DFC has is dropped with it.
        common = {"rate", *(field.name for field in fields(FracConfig) if not field.compare)}
        options = {key: value for key, value in options.items() if key in common}
    return FracConfig.from_dict({**options, "dynamic": connection == "dfc"})


def _from_residual(values: dict[str, Any]) -> list[str]:
    wanted = values.get("from_residual", False)
    if not isinstance(wanted, bool):
        raise UserError(f"from_residual is a switch: set it to true or false, not {wanted!r}")
    return ["--frac-from-residual"] if wanted else []


def _split(sections: dict[str, dict[str, Any]], path: Path) -> tuple[str, Path, dict[str, Any]]:
    settings = {key: value for name in SECTIONS if name != "frac" for key, value in sections[name].items()}
    family = settings.pop("family", "gpt")
    if family not in FAMILIES:
        raise UserError(unknown("family", str(family), FAMILIES))
    return family, Path(settings.pop("run_dir", None) or Path("runs") / path.stem), settings


def _set_hybrid_pattern(settings: dict[str, Any]) -> None:
    """Turn the layers of a GPT config into a pattern, unless the file gives one."""
    from megatron.training.arguments import moe_freq_type

    from megatron_fc.megatron.hybrid import hybrid_pattern

    layers = settings.pop("num_layers", None)
    frequency = settings.pop("moe_layer_freq", 1) if settings.get("num_experts") else None
    if settings.get("hybrid_layer_pattern"):
        return
    if layers is None:
        raise UserError("family=hybrid needs hybrid_layer_pattern or num_layers: set one, e.g. num_layers: 16")
    frequency = moe_freq_type(frequency) if isinstance(frequency, str) else frequency
    settings["hybrid_layer_pattern"] = hybrid_pattern(int(layers), frequency)


def _refuse_missing_te(settings: dict[str, Any]) -> None:
    if has_transformer_engine():
        return
    remedy = "install it (pip install 'megatron_fc[te]', needs a GPU) or drop the setting"
    if settings.get("transformer_impl") == "transformer_engine":
        raise UserError(f"transformer_impl=transformer_engine, but Transformer Engine is not installed: {remedy}")
    for name in ("fp8_format", "fp4_format"):
        if settings.get(name):
            raise UserError(f"{name}={settings[name]} needs Transformer Engine, which is not installed: {remedy}")


def _adapt_to_machine(settings: dict[str, Any]) -> list[str]:
    notes = []
    for adaptation in adaptations(settings.get("transformer_impl")):
        notes.append(adaptation.reason)
        for name, value in adaptation.settings.items():
            settings.setdefault(name, value)
    return notes


def _set_run_paths(settings: dict[str, Any], run_dir: Path) -> None:
    settings.setdefault("tensorboard_dir", str(run_dir / "tensorboard"))
    settings.setdefault("log_timers_to_tensorboard", True)
    if settings.get("save_interval"):
        settings.setdefault("save", str(run_dir / "checkpoints"))
        settings.setdefault("load", settings["save"])
        settings.setdefault("exit_signal_handler", True)
        # The file says how the run goes on, also where that has changed since the checkpoint.
        settings.setdefault("override_opt_param_scheduler", True)


def data_files(args: argparse.Namespace) -> dict[Path, str]:
    """Return the files that a run reads, data and tokenizer, each with the setting that names it."""
    files = {
        Path(prefix + suffix): f"{name}={prefix}"
        for name in _DATA_KEYS
        for prefix in _prefixes(getattr(args, name) or [])
        for suffix in (".bin", ".idx")
    }
    tokenizer = args.tokenizer_model
    # A name on a hub has one slash and is no path; anything else must be there.
    if tokenizer and (os.path.exists(tokenizer) or tokenizer.count("/") != 1 or tokenizer[0] in "./"):
        files[Path(tokenizer)] = f"tokenizer_model={tokenizer}"
    return files


def refuse_missing_files(args: argparse.Namespace) -> None:
    """Check that a run's data and tokenizer are here.

    Raises:
        UserError: a file is missing, or no data are named.
    """
    for file, setting in data_files(args).items():
        if not file.exists():
            raise UserError(f"{setting}: {file} does not exist; `megatron-fc data demo` makes the demo's data")
    if not args.mock_data and not any(getattr(args, name) for name in _DATA_KEYS):
        raise UserError("no data: set data_path, or train_data_path and valid_data_path")


def _prefixes(words: Iterable[str]) -> list[str]:
    """The data prefixes among Megatron's `weight prefix weight prefix` words."""

    def is_weight(word: str) -> bool:
        try:
            float(word)
        except ValueError:
            return False
        return True

    return [word for word in words if not is_weight(word)]

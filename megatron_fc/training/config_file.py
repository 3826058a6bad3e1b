"""A run's YAML file: sections of settings, and `key=value` overrides of them."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from megatron_fc.connections.kinds import KINDS
from megatron_fc.errors import UserError, unknown
from megatron_fc.training.strict_yaml import StrictLoader

SECTIONS = ("model", "connections", "data", "optimizer", "parallel", "checkpoint", "logging")
# A path in somebody's home, and one in a folder that a variable names.
_HOME, _VARIABLE = re.compile(r"~[^/\s]*(/|$)"), re.compile(r"\$\w+(/|$)|\$\{\w+\}")
# Names that people give settings, and what to write.
_SHORT = {
    "tp": "write tensor_model_parallel_size",
    "pp": "write pipeline_model_parallel_size",
    "vpp": "write num_virtual_stages_per_pipeline_rank",
    "cp": "write context_parallel_size",
    "ep": "write expert_model_parallel_size",
    "etp": "write expert_tensor_parallel_size",
    "dp": "data parallelism takes the ranks that tensor, pipeline and context parallelism leave",
    "mbs": "write micro_batch_size",
    "gbs": "write global_batch_size",
    "nodes": "it is an option of topology and launch/, --nodes=N",
    "gpus": "it is an option of topology, --gpus-per-node=G; launch/ takes sbatch's of that name",
    "tokens": "write train_samples, the tokens divided by seq_length",
}
_OWN = {
    "family": "model",
    "precision": "optimizer",
    "perturbation": "optimizer",
    "run_dir": "logging",
    "log_residual_gain": "logging",
    "keep_last": "checkpoint",
    "keep_every": "checkpoint",
    "on_damage": "checkpoint",
}


def read_sections(path: Path, overrides: Sequence[str], arguments: set[str]) -> dict[str, dict[str, Any]]:
    """Read a file and apply overrides.

    Args:
        path: the YAML file.
        overrides: `section.key=value` or `key=value`, the value in YAML's notation.
        arguments: names of Megatron's arguments.

    Returns:
        Settings by section, all sections there.

    Raises:
        UserError: the file cannot be read, or a name is unknown (the nearest valid one is given).
    """
    sections, known = _read(path), arguments | set(_OWN)
    for section, values in sections.items():
        for key in values:
            _check_name(section, key, known)
    for override in overrides:
        _override(sections, override, known)
    _refuse_repeated_names(sections)
    return {
        section: {key: _at_home(key, value) for key, value in values.items()} for section, values in sections.items()
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.load(path.read_text("utf-8"), StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8, line {line} has a byte that is none: save it as UTF-8") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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


def _connection_names() -> list[str]:
    """`connection` says which kind, whether it is dynamic, and with `rate` how many slots it has."""
    options = {field.name: None for kind in KINDS.values() for field in fields(kind)}
    for name in ("dynamic", "slots"):
        del options[name]
    return ["connection", "from_residual", *options]


def _unknown(section: str, key: str, known: Iterable[str]) -> UserError:
    if remedy := _SHORT.get(key):
        return UserError(f"unknown key in section {section}: {key!r}: {remedy}")
    return UserError(unknown(f"key in section {section}:", key, known))


def _check_name(section: str, key: str, known: set[str]) -> None:
    if section == "connections":
        if key not in _connection_names():
            raise _unknown(section, key, _connection_names())
    elif key not in known or _OWN.get(key, section) != section:
        raise _unknown(section, key, known)


def _override(sections: dict[str, dict[str, Any]], override: str, known: set[str]) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is no override: write key=value, and Megatron flags after --")
    section, dot, key = name.rpartition(".")
    if dot and section not in SECTIONS:
        raise UserError(unknown("section", section, SECTIONS))
    if not dot:
        section = _section_of(key, sections)
        if key not in known and section != "connections":  # it may be meant for any section
            raise _unknown(section, key, [*known, *_connection_names()])
    _check_name(section, key, known)
    try:
        sections[section][key] = yaml.load(text, StrictLoader)
    except yaml.YAMLError:
        raise UserError(f"the value of {override!r} is not valid YAML: quote it") from None


def _section_of(key: str, sections: dict[str, dict[str, Any]]) -> str:
    """Where a bare key stands already, else its natural place."""
    for section, values in sections.items():
        if key in values:
            return section
    return _OWN.get(key, "connections" if key in _connection_names() else "model")


def _at_home(key: str, value: Any) -> Any:
    """A value, each path in it that begins with ~ completed, as a shell does it where a word begins."""
    if isinstance(value, list):
        return [_at_home(key, item) for item in value]
    if not isinstance(value, str):
        return value
    if _VARIABLE.match(value):
        raise UserError(f"{key}={value} begins with a variable, which only a shell knows: write the path itself")
    if not _HOME.match(value):
        return value
    if (path := os.path.expanduser(value)) == value:
        raise UserError(f"{key}={value} names a home folder that is not here: write the path itself")
    return path


def _refuse_repeated_names(sections: dict[str, dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for section, values in sections.items():
        for key in values:
            if key in seen and "connections" not in (section, seen[key]):
                raise UserError(f"{key} stands in the sections {seen[key]} and {section}: keep one")
            seen[key] = section

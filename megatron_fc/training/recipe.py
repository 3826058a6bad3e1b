"""A run's YAML file -> the Megatron command line that it stands for.

The sections are for the reader: any of Megatron's arguments may stand in any of them, under its own name with
underscores. These names are ours: `model.family` (gpt or hybrid), `optimizer.precision` and `perturbation`,
`logging.run_dir` and `log_residual_gain`, `checkpoint.keep_last`, `keep_every` and `on_damage`, and the section
`connections` (`connection`: residual or the short
name of a kind, `rate`, `from_residual`, and further fields of that kind's configuration).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.retention import Retention
from megatron_fc.checkpoints.start import ON_DAMAGE
from megatron_fc.connections import kinds
from megatron_fc.connections.backend import backend_of
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError, unknown
from megatron_fc.megatron.flags import connection_flags
from megatron_fc.training import cpu_lane
from megatron_fc.training.config_file import SECTIONS, read_sections
from megatron_fc.training.data_files import refuse_missing_files, refuse_two_sources, repetition
from megatron_fc.training.machine import adaptations, device_capability, has_transformer_engine
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.precision import apply_precision, refuse_impossible, refuse_on_device
from megatron_fc.training.warm_up import never_at_the_peak

CONNECTIONS = ("residual", *kinds.MEMBERS)
FAMILIES = ("gpt", "hybrid")


@dataclass
class Recipe:
    """A run, resolved and checked.

    Attributes:
        sections: the YAML after overrides, as it is kept in the run's summary.
        connection: options of the connections, None for plain residuals.
        family: gpt or hybrid.
        run_dir: folder of everything that the run writes.
        argv: Megatron's command line, our flags included.
        backend: triton or torch; None for plain residuals, or where only the machines of the run can tell.
        on_damage: what to do with a damaged checkpoint, one of `resume.ON_DAMAGE`.
        retention: which checkpoints stay, None for all.
        notes: what was chosen for this machine, one sentence each.
        perturbation: number of that of the first weights, None for none.
        log_residual_gain: TensorBoard gets the largest gain of the residual path at every logged iteration.
    """

    sections: dict[str, dict[str, Any]]
    connection: ConnectionConfig | None
    family: str
    run_dir: Path
    argv: list[str]
    backend: str | None
    on_damage: str
    retention: Retention | None
    notes: list[str] = field(default_factory=list)
    perturbation: int | None = None
    log_residual_gain: bool = False

    @property
    def label(self) -> str:
        """The connections as tables show them: residual, sfc_x4, dfc_x4, dhc_x4 ..."""
        return "residual" if self.connection is None else self.connection.label

    def told(self) -> list[str]:
        """Return the notes as a terminal shows them."""
        return [note if note.startswith("WARNING: ") else f"note: {note}" for note in self.notes]


_OF_ALL = ("connection", "from_residual", "rate", "fractions")
_OPTIONS = [field for kind in kinds.KINDS.values() for field in fields(kind)]
# The options that change what a connection computes; the others change memory and time.
_PREDICTING = {field.name for field in _OPTIONS if field.compare}
# Kinds may differ in one.
_DEFAULTS = {name: [field.default for field in _OPTIONS if field.name == name] for name in {f.name for f in _OPTIONS}}


def load_recipe(
    path: Path, overrides: Sequence[str] = (), extra: Sequence[str] = (), *, elsewhere: bool = False
) -> Recipe:
    """Read a YAML file, apply `key=value` overrides and extra Megatron flags, check all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value` or `key=value`, the value in YAML's notation.
        extra: Megatron flags appended as they are; they win over the file. The connection is no business of theirs.
        elsewhere: the run is for other machines: nothing is adapted to this one, and its files are not looked for.

    Raises:
        UserError: a name is unknown (the nearest valid one is given), a value is wrong, a file is missing, or the
            machine lacks what the run asks for. Nothing has been written then.
    """
    megatron = megatron_arguments()
    megatron.refuse_connection_flags(extra)
    sections = read_sections(path, overrides, megatron.names())
    connection, notes = _connection(sections["connections"])
    family, run_dir, settings = _split(sections, path)
    on_damage = settings.pop("on_damage", "refuse")
    if on_damage not in ON_DAMAGE:
        raise UserError(unknown("on_damage", str(on_damage), ON_DAMAGE))
    retention = Retention.from_settings(settings)
    perturbation, log_residual_gain = _along(settings, connection)
    if family == "hybrid":
        _set_hybrid_pattern(settings)
    apply_precision(settings)
    if connection is not None and "hidden_size" in settings:
        connection.slot_width(int(settings["hidden_size"]))
    backend = None
    if not elsewhere:
        _refuse_missing_te(settings)
        notes += _adapt_to_machine(settings)
    if connection is not None and not elsewhere:
        backend, reason = backend_of(connection, "cpu" if cpu_lane.needed() else "cuda")
        notes.append(f"{connection.label} runs on {backend}: {reason}")
    _set_run_paths(settings, run_dir)
    argv = [*megatron.flags(settings), *(connection_flags(connection) if connection else [])]
    argv += [*_from_residual(sections["connections"]), *extra]
    args = megatron.parse(argv)
    if args.spec is not None:
        raise UserError(
            f"spec={' '.join(args.spec)} would be a second source of the connection: megatron-fc train builds its "
            f"layers from connections.connection and model.family, set those"
        )
    refuse_impossible(args)
    refuse_two_sources(args)
    if not elsewhere:
        refuse_on_device(args, device_capability())
        refuse_missing_files(args)
        notes += [said for said in (repetition(args), never_at_the_peak(args)) if said]
    return Recipe(
        sections,
        connection,
        family,
        run_dir,
        argv,
        backend,
        on_damage,
        retention,
        notes,
        perturbation,
        log_residual_gain,
    )


def _connection(values: dict[str, Any]) -> tuple[ConnectionConfig | None, list[str]]:
    """The connections that a section describes, None for plain residuals, and what of it they do not have."""
    name = values.get("connection", "dfc")
    if name not in CONNECTIONS:
        raise UserError(unknown("connection", str(name), CONNECTIONS))
    if name == "residual":
        # The other keys are of its twins, which one override makes of the same file.
        return None, []
    config, _ = kinds.MEMBERS[name]
    of_kind = {field.name for field in fields(config)}
    # One override turns a file into its twin of another kind: what the kind does not have is dropped with it, be it at
    # its default or an option of the prediction. The rest is refused.
    lacking = _PREDICTING if name in ("sfc", "shc") else _PREDICTING - of_kind
    options = {key: value for key, value in values.items() if key not in _OF_ALL}
    dropped = {
        key for key, value in options.items() if key in lacking or (key not in of_kind and value in _DEFAULTS[key])
    }
    kept = {key: value for key, value in options.items() if key not in dropped}
    for key in kept.keys() - of_kind:
        having = [other for other, (kind, _) in kinds.MEMBERS.items() if key in {field.name for field in fields(kind)}]
        raise UserError(f"{key}={kept[key]} is an option of {', '.join(having)}, which {name} does not have: drop it")
    connection: ConnectionConfig = kinds.member(name, values.get("rate", 4), values.get("fractions"), kept)
    lost = [f"{key}={options[key]}" for key in sorted(dropped) if options[key] not in _DEFAULTS[key]]
    return connection, [f"{connection.label} does without {', '.join(lost)}"] if lost else []


def _from_residual(values: dict[str, Any]) -> list[str]:
    wanted = values.get("from_residual", False)
    if not isinstance(wanted, bool):
        raise UserError(f"from_residual is a switch: set it to true or false, not {wanted!r}")
    return ["--from-residual"] if wanted else []


def _split(sections: dict[str, dict[str, Any]], path: Path) -> tuple[str, Path, dict[str, Any]]:
    settings = {key: value for name in SECTIONS if name != "connections" for key, value in sections[name].items()}
    family = settings.pop("family", "gpt")
    if family not in FAMILIES:
        raise UserError(unknown("family", str(family), FAMILIES))
    return family, Path(settings.pop("run_dir", None) or Path("runs") / path.stem), settings


def _along(settings: dict[str, Any], connection: ConnectionConfig | None) -> tuple[int | None, bool]:
    """The perturbation of the first weights, and whether the residual gain is logged; plain residuals have none."""
    perturbation, gain = settings.pop("perturbation", None), settings.pop("log_residual_gain", False)
    if perturbation is not None and (not isinstance(perturbation, int) or isinstance(perturbation, bool)):
        raise UserError(f"perturbation={perturbation!r} is no whole number: give 1, 2, 3 ... or null")
    if not isinstance(gain, bool):
        raise UserError(f"log_residual_gain is a switch: set it to true or false, not {gain!r}")
    return perturbation, gain and connection is not None


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

"""Named specs, made for the model that a script builds.

Megatron's GPT builder calls what `--spec` names with the model's config, unless it is a ModuleSpec. All other builders
take it as it is. So there are two kinds of named specs, and each tells the other's scripts which one is theirs.
"""

import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_fc.connections import kinds
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import connection_from_args, refuse_flags_beside
from megatron_fc.megatron.hybrid import hybrid_stack
from megatron_fc.megatron.model_config import prepare
from megatron_fc.megatron.norm_options import NormOptions, norms_from_args
from megatron_fc.megatron.refusals import training_args
from megatron_fc.megatron.specs.connected import block_spec, connect
from megatron_fc.megatron.specs.norms import place_norms, plain_spec
from megatron_fc.megatron.stored_connections import refuse_other_checkpoint

_NAME = re.compile(r"(?:(?P<prefix>layer|hybrid)_)?(?P<label>\w+_x\d\w*|from_args)")
_MODULE = "--spec megatron_fc.megatron.specs"


class NotASpec(UserError, AttributeError):
    """What a builder looks for in a spec and this one does not have; an `AttributeError`, so that `hasattr` says so."""


class GPTSpec(TransformerBlockSubmodules):
    """f(model_config, vp_stage) -> the spec that Megatron would build without `--spec`, connected.

    MoE pattern, MLA and Transformer Engine included. It is no block of layers itself, but goes as one where a builder
    does not call it, to say in a sentence what to do.

    Args:
        name: what `--spec` calls it.
        config: the options of the connections, or what returns them when a model is built.
        norms: of the model; None takes those of the script's arguments.
        checks_load: refuse a checkpoint of other connections, as nobody else does behind `--spec`.
    """

    def __init__(
        self,
        name: str,
        config: ConnectionConfig | Callable[[], ConnectionConfig],
        norms: NormOptions | None = None,
        checks_load: bool = True,
    ) -> None:
        self.name = name
        self._norms = norms
        self._config = config
        self._checks_load = checks_load

    def __call__(self, model_config: Any, vp_stage: int | None = None) -> Any:
        config, args = _chosen(self._config), training_args()
        if model_config.transformer.mtp_num_layers:
            warnings.warn(
                "--spec reaches the decoder only: the multi-token-prediction layers keep plain residuals. Pass "
                "connect(get_gpt_mtp_block_spec(...)) to GPTModel, or train a hybrid model, to connect them",
                stacklevel=2,
            )
        if self._checks_load and args is not None:
            refuse_flags_beside(args, config, f"--spec {self.name}")
            refuse_other_checkpoint(args, config)
        prepare(model_config, config, args)
        norms = norms_from_args(args) if self._norms is None else self._norms
        spec = plain_spec(norms, model_config, vp_stage)
        return connect(block_spec(spec, model_config.transformer, vp_stage) if config.is_wide else spec, config)

    @property
    def layer_specs(self) -> NoReturn:
        """Asked for by older GPT builders."""
        raise NotASpec(f"this script does not call what --spec names: use {_MODULE} layer_{self.name}")

    layer_norm = submodules = layer_specs

    @property
    def module(self) -> NoReturn:
        """Asked for by the builders of hybrid models."""
        raise NotASpec(f"{self.name} is for GPT models: use {_MODULE} hybrid_{self.name} for a hybrid one")

    def __repr__(self) -> str:
        return f"GPTSpec({self.name!r})"

    __eq__, __hash__ = object.__eq__, object.__hash__


class UncalledSpec(ModuleSpec):
    """A spec that is made when a builder looks into it, for the model that Megatron's arguments describe.

    Args:
        name: what `--spec` calls it.
        make: f(arguments) -> the spec.
    """

    def __init__(self, name: str, make: Callable[[Namespace | None], ModuleSpec]) -> None:
        self.name = name
        self._make = make
        self._made: tuple[Namespace | None, ModuleSpec] | None = None

    def _spec(self) -> ModuleSpec:
        args = training_args()
        if self._made is None or self._made[0] is not args:
            self._made = args, self._make(args)
        return self._made[1]

    module = property(lambda self: self._spec().module)
    params = property(lambda self: self._spec().params)
    submodules = property(lambda self: self._spec().submodules)
    metainfo = property(lambda self: self._spec().metainfo)

    def __repr__(self) -> str:
        return f"UncalledSpec({self.name!r})"

    __eq__, __hash__ = object.__eq__, object.__hash__


def gpt_spec(config: ConnectionConfig, norms: NormOptions) -> GPTSpec:
    """Return what a GPTModelConfig takes as its `transformer_layer_spec`."""
    return GPTSpec(config.label, config, norms, checks_load=False)


def named_spec(name: str) -> Any:
    """Return what `--spec` finds under a name, None if it is no name of a spec."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    config = _config_from_args if match["label"] == "from_args" else kinds.from_label(match["label"])
    if config is None:
        return None
    if match["prefix"] is None:
        return GPTSpec(name, config)
    make = _hybrid if match["prefix"] == "hybrid" else _layers

    def made(args: Namespace | None) -> ModuleSpec:
        chosen = _chosen(config)
        if args is not None:
            refuse_flags_beside(args, chosen, f"--spec {name}")
        refuse_other_checkpoint(args, chosen)
        return make(name, chosen, args)

    return UncalledSpec(name, made)


def _chosen(config: ConnectionConfig | Callable[[], ConnectionConfig]) -> ConnectionConfig:
    return config if isinstance(config, ConnectionConfig) else config()


def _hybrid(name: str, config: ConnectionConfig, args: Namespace | None) -> ModuleSpec:
    if args is not None and not args.hybrid_layer_pattern:
        raise UserError(f"{name} is for hybrid models: use {_MODULE} {name.removeprefix('hybrid_')} for a GPT one")
    return connect(place_norms(hybrid_stack(), norms_from_args(args)), config, exchanges_shapes=True)


def _layers(name: str, config: ConnectionConfig, args: Namespace | None) -> ModuleSpec:
    """One layer for all, or a block where the layers differ."""
    from megatron.training.argument_utils import gpt_config_from_args

    if args is None:
        raise UserError(f"{name} is for scripts that parse Megatron's arguments: use connect where there are none")
    if args.hybrid_layer_pattern:
        raise UserError(
            f"{name} is for GPT models: use {_MODULE} hybrid_{name.removeprefix('layer_')} for a hybrid one"
        )
    args.connection_parameters_first = False  # nothing that sees the model config is called here
    model_config = gpt_config_from_args(args)
    plain = plain_spec(norms_from_args(args), model_config)
    plain = block_spec(plain, model_config.transformer, None) if config.is_wide else plain
    spec = connect(plain, config, exchanges_shapes=True)
    if not isinstance(spec, TransformerBlockSubmodules):
        return spec
    if args.virtual_pipeline_model_parallel_size:
        raise UserError(
            f"{name} does not know for which virtual pipeline stage its layers are: take "
            f"--num-layers-per-virtual-pipeline-stage away, or a script that calls what --spec names"
        )
    return ModuleSpec(TransformerBlock, submodules=spec)


def _config_from_args() -> ConnectionConfig:
    args = training_args()
    if args is None or not hasattr(args, "from_residual"):
        raise UserError(
            f"{_MODULE} from_args reads flags that this script does not have: let it parse its arguments with "
            f"extra_args_provider=megatron_fc.megatron.flags.add_connection_args, or name a spec, as {_MODULE} dfc_x4"
        )
    if args.from_residual:
        raise UserError(
            "--from-residual is a step of `megatron-fc train`: here convert the checkpoint by `megatron-fc "
            "upcycle` first, and load the result"
        )
    config = connection_from_args(args)
    if config is None:
        raise UserError(f"{_MODULE} from_args needs a kind: set --frac-rate, --hyper-slots or --manifold-slots")
    return config

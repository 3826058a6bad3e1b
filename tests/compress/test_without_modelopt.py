"""Commands and checkpoints that need ModelOpt, where it is not installed."""

from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.checkpoints.modelopt_state import UNQUANTIZED, has_state, refuse_state, require_modelopt
from megatron_fc.compress.distill import Distillation
from megatron_fc.compress.quantize import quantize
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError
from support import tiny
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

pytestmark = pytest.mark.skipif(find_spec("modelopt") is not None, reason="ModelOpt is installed here")


def test_commands_name_the_extra(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"megatron-fc quantize needs NVIDIA ModelOpt.*pip install 'megatron_fc\[mod"):
        quantize(None, tmp_path, tmp_path / "to", "fp8", 4)  # type: ignore[arg-type]  # refused before it is read
    with pytest.raises(UserError, match=r"megatron-fc distill needs NVIDIA ModelOpt"):
        Distillation(None, tmp_path)  # type: ignore[arg-type]


def test_quantised_checkpoint_is_recognised_without_it(tmp_path: Path) -> None:
    assert not has_state(tmp_path)
    (tmp_path / "modelopt_state").mkdir()
    assert has_state(tmp_path)
    with pytest.raises(UserError, match="is quantised: prune"):
        refuse_state(tmp_path, "prune another")
    with pytest.raises(UserError, match="the checkpoint x, which is quantised, needs NVIDIA ModelOpt"):
        require_modelopt("the checkpoint x, which is quantised,")


@pytest.mark.parametrize("kind", ["mtp", "hybrid"])
@pytest.mark.parametrize(
    "connection",
    [FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")],
    ids=lambda connection: connection.label,
)
def test_the_patterns_reach_every_parameter_of_a_connection(connection: ConnectionConfig, kind: str) -> None:
    names = [name for name, _ in tiny.build(kind, connection).named_parameters() if is_connection_key(name)]
    assert names
    assert all(any(fnmatch(name, pattern) for pattern in UNQUANTIZED) for name in names)

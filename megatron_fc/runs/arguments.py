"""The arguments of a run, read back from the start of its TensorBoard events, where Megatron writes each as text."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SUFFIX = "/text_summary"
# A record: its length, a checksum of that, the data, a checksum of those.
_LENGTH, _CHECKSUM = struct.Struct("<Q4x"), 4


def read_arguments(run_dir: Path) -> dict[str, str]:
    """Return Megatron's arguments of the run's last start, each as Megatron printed it; {} before the first.

    Args:
        run_dir: folder of the run; the events are looked for in `tensorboard`.
    """
    files = (run_dir / "tensorboard").glob("events.out.tfevents.*")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with open(path, "rb") as file:
            arguments = dict(_texts(file))
        if arguments:
            return arguments
    return {}


def _texts(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """The texts before the first scalars of training, which are many; a record that is being written ends them."""
    from tensorboard.compat.proto.event_pb2 import Event

    while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
        size = _LENGTH.unpack(head)[0]
        data = file.read(size + _CHECKSUM)
        if len(data) < size + _CHECKSUM:
            return
        values = Event.FromString(data[:size]).summary.value
        if any(value.tag == "lm loss" for value in values):
            return
        for value in values:
            if value.tag.endswith(_SUFFIX) and value.tensor.string_val:
                yield value.tag.removesuffix(_SUFFIX), value.tensor.string_val[0].decode(errors="replace")

"""Ways in which files of checkpoints break."""

from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader

SHARD = "__0_0.distcp"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def corrupt(checkpoint: Path, prefix: str) -> None:
    """Flip a bit in the middle of the largest tensor whose key begins so; twice, and it is as before."""
    places = FileSystemReader(checkpoint).read_metadata().storage_data
    place = max((info for key, info in places.items() if key.fqn.startswith(prefix)), key=lambda info: info.length)
    flip(checkpoint / place.relative_path, place.offset + place.length // 2)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

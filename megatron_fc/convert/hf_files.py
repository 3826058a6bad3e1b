"""A Hugging Face model's files: its configuration, and its tensors one at a time."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_fc.errors import UserError

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceFiles:
    """A folder with `config.json` and safetensors.

    Args:
        source: the folder, or a name on the hub, whose files are then downloaded or found in the cache.

    Raises:
        UserError: they are not there.
    """

    def __init__(self, source: str) -> None:
        self.folder = Path(source) if Path(source).is_dir() else _download(source)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{source} holds no config.json: give a folder that save_pretrained wrote, or a hub name")
        self._files = self._weight_map(source)

    def model_type(self) -> str | None:
        """What the model calls itself."""
        said: str | None = _json(self.folder / "config.json").get("model_type")
        return said

    def config(self) -> dict[str, Any]:
        """The model's configuration, defaults filled in.

        Raises:
            UserError: transformers does not take it.
        """
        from transformers import AutoConfig

        try:
            config: dict[str, Any] = AutoConfig.from_pretrained(self.folder).to_dict()
        except Exception as error:  # checks of transformers' own and of huggingface_hub
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.folder / 'config.json'} is refused by transformers, {said}: download it again"
            ) from None
        return config

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype, as safetensors calls it, and shape of each tensor, without its numbers.

        Raises:
            UserError: a file is damaged, or lacks a tensor that the index says is in it.
        """
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in sorted(set(self._files.values())):
            with _opened(self.folder / file) as opened:
                held = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            found |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in held.items()}
        for missing in sorted(self._files.keys() - found.keys()):
            raise UserError(f"{self.folder / self._files[missing]} lacks {missing}: download it again")
        return found

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        with _opened(self.folder / self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _weight_map(self, source: str) -> dict[str, str]:
        if (self.folder / _INDEX).is_file():
            files: dict[str, str] = _json(self.folder / _INDEX).get("weight_map", {})
            for missing in {file for file in files.values() if not (self.folder / file).is_file()}:
                raise UserError(f"{source} lacks {missing}, which its index names: download it again")
            return files
        if not (self.folder / _ONE_FILE).is_file():
            raise UserError(f"{source} holds no safetensors: save the model with save_pretrained")
        with _opened(self.folder / _ONE_FILE) as file:
            return dict.fromkeys(file.keys(), _ONE_FILE)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, it holds no JSON object: download it again")
    return content


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, {error}: download it again") from None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"{name} is no folder, and no name on the hub, which is OWNER/MODEL: give one of them")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise UserError(
            f"{name} cannot be downloaded, {type(error).__name__}: fetch it where a network is, and give the folder"
        ) from None

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
        said: str | None = json.loads((self.folder / "config.json").read_text()).get("model_type")
        return said

    def config(self) -> dict[str, Any]:
        """The model's configuration, defaults filled in."""
        from transformers import AutoConfig

        config: dict[str, Any] = AutoConfig.from_pretrained(self.folder).to_dict()
        return config

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.folder / self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _weight_map(self, source: str) -> dict[str, str]:
        from safetensors import safe_open

        if (self.folder / _INDEX).is_file():
            files: dict[str, str] = json.loads((self.folder / _INDEX).read_text())["weight_map"]
            for missing in {file for file in files.values() if not (self.folder / file).is_file()}:
                raise UserError(f"{source} lacks {missing}, which its index names: download it again")
            return files
        if not (self.folder / _ONE_FILE).is_file():
            raise UserError(f"{source} holds no safetensors: save the model with save_pretrained")
        with safe_open(self.folder / _ONE_FILE, "pt") as file:
            return dict.fromkeys(file.keys(), _ONE_FILE)


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

"""The packages that commands import beyond what the plugin does, as pyproject.toml lists them in its extras."""

# Name of the import -> name of the package.
TRAIN = {
    "huggingface_hub": "huggingface-hub",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "psutil": "psutil",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "yaml": "pyyaml",
}
# What `megatron-fc data tokenize` needs besides, in the extra `data`. datatrove asks for none of what it reads with.
DATA = {
    "datatrove": "datatrove",
    "fsspec": "fsspec",
    "orjson": "orjson",
    "pyarrow": "pyarrow",
}
# The harness brings datasets, and imports it.
EVAL = {"lm_eval": "lm-eval", "datasets": "datasets"}
_BASE = {"torch": "torch", "megatron": "megatron-core", "packaging": "packaging"}


def remedy(error: ModuleNotFoundError) -> str | None:
    """Return e.g. ``pyyaml, which is not installed: pip install 'megatron_fc[train]'``, None for other modules."""
    name = error.name or ""
    if name in TRAIN:
        return f"{TRAIN[name]}, which is not installed: pip install 'megatron_fc[train]'"
    if name in DATA:
        return f"{DATA[name]}, which is not installed: pip install 'megatron_fc[data]'"
    if name in EVAL:
        return f"{EVAL[name]}, which is not installed: pip install 'megatron_fc[eval]'"
    if name in _BASE:
        return f"{_BASE[name]}, which is not installed: pip install megatron_fc"
    return None

"""Tokenizers of transformers by folder or by name on the hub of Hugging Face, on machines that may have no internet.

What is not in the hub's cache is asked for again and again by its client, for minutes and with a line per try, and so
it is by Megatron. Here one short request tells first whether there is a connection.
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError

_SECONDS = 5.0  # for the request, after which there is no connection


def is_hub_name(name: str) -> bool:
    """Return whether a tokenizer is no path: a name on the hub has one slash, inside."""
    return not os.path.exists(name) and name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/"


def refuse_out_of_reach(name: str, setting: str) -> None:
    """Check that a tokenizer can be loaded; without a connection the client of the hub is told so, for this process.

    Args:
        name: a folder, or a name on the hub.
        setting: that names it, e.g. "tokenizer_model=" and the name.

    Raises:
        UserError: it has a name on the hub, there is no connection, and it is not in the cache.
    """
    if not is_hub_name(name) or (reason := _no_connection()) is None:
        return
    from huggingface_hub import constants
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        raise UserError(
            f"{setting}: no folder here, no connection to the hub ({reason}), and not in its cache: on a machine with "
            f"internet `hf download {name} --include '*token*' --local-dir DIR`, then {setting.removesuffix(name)}DIR"
        ) from None
    # Else it would look for the files that this tokenizer does not have, again and again.
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def refuse_tokenizer_out_of_reach(args: Namespace) -> None:
    """Do the same for the tokenizer of a run, before Megatron builds it.

    Args:
        args: Megatron's, parsed.
    """
    if args.tokenizer_model and args.tokenizer_type == "HuggingFaceTokenizer":
        refuse_out_of_reach(args.tokenizer_model, f"tokenizer_model={args.tokenizer_model}")


def load_tokenizer(name: Path | str, setting: str) -> Any:
    """Load a tokenizer of transformers from a folder, or by its name on the hub, which is no Path.

    Args:
        name, setting: as in `refuse_out_of_reach`.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{setting} cannot be loaded: it is a file, give its folder")
    if isinstance(name, Path) and not path.exists():
        raise UserError(f"{setting} cannot be loaded: the folder does not exist")
    refuse_out_of_reach(str(name), setting)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of a broken file, the library's own
        reason = str(error).partition("\n")[0]
        if not path.exists():
            reason = f"it is no folder here, and the hub says: {reason}"
        elif not (path / "tokenizer.json").exists():
            reason = "the folder has no tokenizer.json"
        raise UserError(f"{setting} cannot be loaded: {reason}") from None


def _no_connection() -> str | None:
    """Why the hub cannot be reached, None where it answers, whatever that is."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # each version of the client has its own class for it
        return " ".join(str(error).split()) or type(error).__name__
    return None

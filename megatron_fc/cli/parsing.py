"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:  # the class has parameters for type checkers only
    Commands = argparse._SubParsersAction


def add_remaking(parser: argparse.ArgumentParser) -> None:
    """Words of commands that make another checkpoint of a trained one, by running it on its validation data."""
    parser.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run that wrote them")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    parser.add_argument(
        "--calibration-iters", type=int, default=16, metavar="N", help="validation iterations (default: %(default)s)"
    )

"""What the parsers of commands have in common."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:  # the class has parameters for type checkers only
    Commands = argparse._SubParsersAction

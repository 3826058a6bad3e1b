"""Importing this lets Megatron's parser remember what the sources of its config classes say of their fields.

It parses them anew whenever it is made, which takes a fifth of a second; tests make it hundreds of times.
"""

from functools import cache

from megatron.training.argument_utils import ArgumentGroupFactory

_read = ArgumentGroupFactory._get_field_docstrings


@cache
def _remembered(config_class: type) -> dict[str, str]:
    return _read(ArgumentGroupFactory.__new__(ArgumentGroupFactory), config_class)


ArgumentGroupFactory._get_field_docstrings = lambda _, config_class: dict(_remembered(config_class))

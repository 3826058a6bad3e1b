"""YAML in which no key of a mapping stands twice."""

from collections.abc import Hashable
from typing import Any

import yaml

from megatron_fc.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of several equal keys win, and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            # Behind `<<` stand defaults, several of them where a list does, and a key of its own may replace each.
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"{key.value} stands in the lines {lines[key.value]} and {line}: keep one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

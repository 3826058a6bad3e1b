"""Links of docs/ that lead to files elsewhere in the repository: the site names the file by its path instead.

mkdocs calls `on_page_markdown` for every page (`hooks` in mkdocs.yml). What lies beside docs/ is not on the site;
where the text is read in the repository the link works.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")
_ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with such links as `text (path)`.

    Raises:
        PluginError: there is no such file.
    """
    folder = Path(page.file.abs_src_path).parent

    def named(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[2]))
        if not target.exists():
            raise PluginError(f"{page.file.src_path} links to {link[2]}, which does not exist")
        if target.is_relative_to(_ROOT / "docs"):
            return link[0]
        path = target.relative_to(_ROOT)
        return f"`{path}`" if link[1].strip("`") == str(path) else f"{link[1]} (`{path}`)"

    return _LINK.sub(named, markdown)

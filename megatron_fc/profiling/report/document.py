"""The frame of every page: one HTML document with its style, which needs no network and no script."""

from html import escape
from importlib.resources import files


def document(title: str, subject: str, subtitle: str, body: str) -> str:
    """Return a page.

    Args:
        title: of the page, up to its subject.
        subject: which the heading shows in colour.
        subtitle: the line below.
        body: HTML.
    """
    style = files("megatron_fc.profiling.report").joinpath("page.css").read_text()
    title, subject = escape(title), escape(subject)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title} {subject}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{title} <em>{subject}</em></h1><p>{escape(subtitle)}</p></header>\n"
        f"<main>{body}</main></body></html>\n"
    )

"""HTML from values: every text is escaped where it is put into the page, and only there.

`Html` marks what is markup already. Whatever else an element is given is text, from wherever it comes.
"""

from __future__ import annotations

from html import escape

__all__ = ["Child", "Html", "element", "join"]


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | float | None
_VOID = frozenset({"br", "hr", "meta", "col"})


def element(tag: str, *children: Child, **attributes: str | int | None) -> Html:
    """`<tag attributes>children</tag>`; None leaves an attribute or a child out.

    Attribute names: a trailing underscore is dropped ("class_"), others become hyphens ("aria_label").
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"')
    parts.append(">")
    if tag not in _VOID:
        parts += [join(*children), f"</{tag}>"]
    return Html("".join(parts))


def join(*children: Child) -> Html:
    """Children one after the other: markup as it is, everything else escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(_printable(str(child)))
            for child in children
            if child is not None
        )
    )


def _printable(text: str) -> str:
    """Without control characters, which HTML does not allow."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )

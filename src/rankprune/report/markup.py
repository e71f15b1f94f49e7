"""Elements of HTML and SVG. Text and attributes are escaped when they are written, wherever they come from."""

from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

Content = Element | str | Iterable["Element | str"]
_LINES = {
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "main",
    "section",
    "div",
    "figure",
    "table",
    "tr",
    "svg",
    "h1",
    "h2",
    "h3",
    "li",
}


def element(tag: str, *content: Content, **attributes: str | float) -> Element:
    """An element around texts and elements, alone or in iterables.

    Args:
        attributes: numbers are rounded to hundredths. A trailing underscore is dropped, as of `class_`, others become hyphens.
    """
    node = Element(tag, {_name(key): _value(value) for key, value in attributes.items()})
    node.tail = "\n" if tag in _LINES else None
    for part in content:
        for child in (part,) if isinstance(part, str | Element) else part:
            if isinstance(child, str):
                _append_text(node, child)
            else:
                node.append(child)
    return node


def html(root: Element) -> str:
    """A whole document."""
    return f"<!doctype html>\n{tostring(root, encoding='unicode', method='html')}"


def _append_text(node: Element, text: str) -> None:
    if len(node):
        node[-1].tail = (node[-1].tail or "") + text
    else:
        node.text = (node.text or "") + text


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{round(value, 2):.10g}"

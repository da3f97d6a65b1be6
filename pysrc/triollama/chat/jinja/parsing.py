"""Templates to trees, by Jinja2's parser."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from . import origins as T
from .budget import TemplateFault

__all__ = ["parse"]

_MAX_BRACKETS = 60
_OPENING = frozenset({"lparen", "lbracket", "lbrace"})
_CLOSING = frozenset({"rparen", "rbracket", "rbrace"})


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: what the assistant says, in templates that mark it themselves."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def filter_stream(self, stream: Any) -> Any:
        """The parser recurses with brackets, and asks for one token at a time."""
        depth = 0
        for token in stream:
            depth += (token.type in _OPENING) - (token.type in _CLOSING)
            if depth > _MAX_BRACKETS:
                raise TemplateFault(f"its brackets are nested deeper than {_MAX_BRACKETS}")
            yield token


_ENVIRONMENT = jinja2.Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
    autoescape=False,
)

_REFUSED = (
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Block,
    nodes.EvalContextModifier,
    nodes.OverlayScope,
)


def parse(source: str) -> nodes.Template:
    """The tree of a template. Raises TemplateFault; ``line`` is in its text."""
    try:
        tree = _ENVIRONMENT.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFault(f"line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise TemplateFault("it is nested too deeply") from None
    todo: list[nodes.Node] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, _REFUSED):
            what = type(node).__name__.lower()
            raise TemplateFault(f"line {node.lineno}: {what} is not supported")
        if isinstance(node, nodes.Const):
            if isinstance(node.value, str):
                node.value = T.from_template(node.value)
        elif isinstance(node, nodes.TemplateData):
            node.data = T.from_template(node.data)
        todo.extend(node.iter_child_nodes())
    return tree

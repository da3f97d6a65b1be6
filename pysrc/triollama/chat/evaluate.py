"""Renders a Jinja template: Jinja2's parser, and an evaluator of our own over its tree.

Jinja2 compiles a template to Python code. Here nothing is compiled: the tree is walked, every
step is counted, every string is measured before it is made, and every character keeps its
origin. Scopes, undefined values and printing follow Jinja2 in a sandbox, set up as
``transformers`` does for chat templates (trim_blocks, lstrip_blocks, loop controls, the tag
``generation``).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from . import text as T
from .filters import (
    DICT_METHODS,
    FILTERS,
    LIST_METHODS,
    STRING_METHODS,
    TESTS,
    escape,
    percent,
    text_of,
)
from .values import (
    Budget,
    Function,
    Lazy,
    Limits,
    Loop,
    Method,
    Namespace,
    TemplateFault,
    Undefined,
    kind,
)

__all__ = ["Evaluator", "Raised", "parse"]

_MAX_RANGE = 100_000
_MAX_BITS = 1024
_MAX_BRACKETS = 60
_OPENING = frozenset({"lparen", "lbracket", "lbrace"})
_CLOSING = frozenset({"rparen", "rbracket", "rbrace"})


class Raised(TemplateFault):
    """The template called ``raise_exception``."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


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


class _Scope:
    """Names of one scope; ``parent`` is the one around it in the template's text."""

    __slots__ = ("parent", "values")

    def __init__(self, parent: _Scope | None, values: dict[str, Any] | None = None) -> None:
        self.parent = parent
        self.values: dict[str, Any] = {} if values is None else values


class _Macro:
    __slots__ = ("body", "names", "node", "scope")

    def __init__(self, node: nodes.Macro | nodes.CallBlock, scope: _Scope) -> None:
        self.node = node
        self.scope = scope
        self.names = [argument.name for argument in node.args]


class Evaluator:
    """One rendering of one template."""

    def __init__(self, limits: Limits, variables: Mapping[str, Any], messages: int) -> None:
        characters = sum(map(len, _strings(variables.get("messages"))))
        self.budget = Budget(limits, messages, characters)
        self.own_lists: dict[int, list[Any]] = {}
        self._depth = 0
        self._loops = 0
        functions = {
            "dict": self._dict,
            "namespace": self._namespace,
            "raise_exception": self._raise,
            "range": self._range,
            "strftime_now": self._strftime_now,
        }
        names: dict[str, Any] = {name: Function(name, call) for name, call in functions.items()}
        names.update(variables)
        self._globals = _Scope(None, names)
        self._scope = self._globals
        self._out: list[str] = []
        self._written = 0
        self._expressions: dict[type, Callable[[Any], Any]] = {
            nodes.Add: self._add,
            nodes.And: self._and,
            nodes.Call: self._call,
            nodes.Compare: self._compare,
            nodes.Concat: self._concat,
            nodes.CondExpr: self._condition,
            nodes.Const: lambda node: node.value,
            nodes.Dict: self._make_dict,
            nodes.Div: self._arithmetic,
            nodes.Filter: self._filter,
            nodes.FloorDiv: self._arithmetic,
            nodes.Getattr: lambda node: self.attribute(self._eval(node.node), node.attr),
            nodes.Getitem: self._getitem,
            nodes.List: self._make_list,
            nodes.Mod: self._arithmetic,
            nodes.Mul: self._arithmetic,
            nodes.Name: self._name,
            nodes.Neg: lambda node: -_number(self._eval(node.node)),
            nodes.Not: lambda node: not self._eval(node.node),
            nodes.Or: self._or,
            nodes.Pos: lambda node: +_number(self._eval(node.node)),
            nodes.Pow: self._arithmetic,
            nodes.Sub: self._arithmetic,
            nodes.TemplateData: lambda node: node.data,
            nodes.Test: self._test,
            nodes.Tuple: lambda node: tuple(self._eval(item) for item in node.items),
        }
        self._statements: dict[type, Callable[[Any], None]] = {
            nodes.Assign: self._assign_node,
            nodes.AssignBlock: self._assign_block,
            nodes.Break: self._break,
            nodes.CallBlock: self._call_block,
            nodes.Continue: self._continue,
            nodes.ExprStmt: lambda node: self._eval(node.node),
            nodes.FilterBlock: self._filter_block,
            nodes.For: self._for,
            nodes.If: self._if,
            nodes.Macro: self._macro,
            nodes.Output: self._output,
            nodes.Scope: lambda node: self._inside(node.body),
            nodes.With: self._with,
        }

    def render(self, tree: nodes.Template) -> str:
        """The text. Raises TemplateFault."""
        self._scope = _Scope(self._globals)
        try:
            self._run(tree.body)
        except TemplateFault:
            raise
        except (_Break, _Continue):
            raise TemplateFault("break or continue outside a loop") from None
        except RecursionError:
            raise TemplateFault("it is nested too deeply, or calls itself without end") from None
        except MemoryError:
            raise TemplateFault("it needs more memory than there is") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TemplateFault(str(error) or type(error).__name__) from None
        return T.concat(self._out) if self._out else ""

    # Statements ---------------------------------------------------------------------------------

    def _run(self, body: list[nodes.Node]) -> None:
        for node in body:
            self.budget.spend(1)
            handler = self._statements.get(type(node))
            if handler is None:
                raise TemplateFault(f"{type(node).__name__.lower()} is not supported")
            handler(node)

    def _inside(self, body: list[nodes.Node], values: dict[str, Any] | None = None) -> None:
        outer = self._scope
        self._scope = _Scope(outer, values)
        try:
            self._run(body)
        finally:
            self._scope = outer

    def _capture(self, body: list[nodes.Node]) -> str:
        """The text that ``body`` writes, in a scope of its own."""
        outer, written = self._out, self._written
        self._out, self._written = [], 0
        try:
            self._inside(body)
            return T.concat(self._out) if self._out else T.from_template("")
        finally:
            self._out, self._written = outer, written

    def _write(self, piece: str) -> None:
        if piece:
            self._written += len(piece)
            self.budget.output(self._written, len(piece))
            self._out.append(piece)

    def _output(self, node: nodes.Output) -> None:
        for child in node.nodes:
            if type(child) is nodes.TemplateData:
                self._write(child.data)
            else:
                self._write(text_of(self, self._eval(child)))

    def _assign_node(self, node: nodes.Assign) -> None:
        self._assign(node.target, self._eval(node.node))

    def _assign(self, target: nodes.Node, value: Any) -> None:
        if isinstance(target, nodes.Name):
            self._scope.values[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = self._lookup(target.name)
            if not isinstance(space, Namespace):
                raise TemplateFault(f"{target.name!r} is no namespace")
            space.values[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            values = self.items(value)
            if len(values) != len(target.items):
                raise TemplateFault(f"{len(values)} values for {len(target.items)} names")
            for name, item in zip(target.items, values, strict=True):
                self._assign(name, item)
        else:
            raise TemplateFault(f"cannot assign to {type(target).__name__.lower()}")

    def _assign_block(self, node: nodes.AssignBlock) -> None:
        value: Any = self._capture(node.body)
        if node.filter is not None:
            value = self._filter(node.filter, value)
        self._assign(node.target, value)

    def _filter_block(self, node: nodes.FilterBlock) -> None:
        self._write(text_of(self, self._filter(node.filter, self._capture(node.body))))

    def _break(self, node: nodes.Node) -> None:
        raise _Break

    def _continue(self, node: nodes.Node) -> None:
        raise _Continue

    def _if(self, node: nodes.If) -> None:
        if self._eval(node.test):
            self._run(node.body)
            return
        for branch in node.elif_:
            self.budget.spend(1)
            if self._eval(branch.test):
                self._run(branch.body)
                return
        self._run(node.else_)

    def _for(self, node: nodes.For) -> None:
        if node.recursive:
            raise TemplateFault("recursive loops are not supported")
        items = self.items(self._eval(node.iter))
        outer = self._scope
        if node.test is not None:
            kept = []
            for item in items:
                self._scope = _Scope(outer)
                try:
                    self._assign(node.target, item)
                    if self._eval(node.test):
                        kept.append(item)
                finally:
                    self._scope = outer
            items = kept
        if not items:
            self._inside(node.else_)
            return
        loop = Loop(items, self._loops)
        self._loops += 1
        try:
            for loop.at, item in enumerate(items):
                self.budget.spend(1)
                self._scope = _Scope(outer, {"loop": loop})
                self._assign(node.target, item)
                try:
                    self._run(node.body)
                except _Continue:
                    continue
                except _Break:
                    break
        finally:
            self._loops -= 1
            self._scope = outer

    def _with(self, node: nodes.With) -> None:
        outer = self._scope
        values = [self._eval(value) for value in node.values]
        self._scope = _Scope(outer)
        try:
            for target, value in zip(node.targets, values, strict=True):
                self._assign(target, value)
            self._run(node.body)
        finally:
            self._scope = outer

    def _macro(self, node: nodes.Macro) -> None:
        self._scope.values[node.name] = _Macro(node, self._scope)

    def _call_block(self, node: nodes.CallBlock) -> None:
        call = node.call
        if isinstance(call.node, nodes.ExtensionAttribute):
            self._write(T.generated(self._capture(node.body)))
            return
        args, kwargs = self._arguments(call)
        kwargs["caller"] = _Macro(node, self._scope)
        self._write(text_of(self, self._invoke(self._eval(call.node), args, kwargs)))

    # Expressions --------------------------------------------------------------------------------

    def _eval(self, node: nodes.Node) -> Any:
        self.budget.spend(1)
        handler = self._expressions.get(type(node))
        if handler is None:
            raise TemplateFault(f"{type(node).__name__.lower()} is not supported here")
        return handler(node)

    def _lookup(self, name: str) -> Any:
        scope: _Scope | None = self._scope
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return Undefined(f"'{name}'")

    def _name(self, node: nodes.Name) -> Any:
        return self._lookup(node.name)

    def _and(self, node: nodes.And) -> Any:
        return self._eval(node.left) and self._eval(node.right)

    def _or(self, node: nodes.Or) -> Any:
        return self._eval(node.left) or self._eval(node.right)

    def _condition(self, node: nodes.CondExpr) -> Any:
        if self._eval(node.test):
            return self._eval(node.expr1)
        if node.expr2 is None:
            return Undefined("the inline if was false and has no else; its value")
        return self._eval(node.expr2)

    def _concat(self, node: nodes.Concat) -> str:
        parts = [text_of(self, self._eval(part)) for part in node.nodes]
        self.budget.string(sum(map(len, parts)))
        return T.concat(parts)

    def _make_list(self, node: nodes.List) -> list[Any]:
        return self._own([self._eval(item) for item in node.items])

    def _own(self, made: list[Any]) -> list[Any]:
        self.own_lists[id(made)] = made
        return made

    def _make_dict(self, node: nodes.Dict) -> dict[Any, Any]:
        made = {}
        for pair in node.items:
            key = self._eval(pair.key)
            if isinstance(key, (list, dict, Undefined)):
                raise TemplateFault(f"a {kind(key)} cannot be a key")
            made[key] = self._eval(pair.value)
        return made

    def _compare(self, node: nodes.Compare) -> bool:
        left = self._eval(node.expr)
        for operand in node.ops:
            right = self._eval(operand.expr)
            if not self.compare(_OPERATORS[operand.op], left, right):
                return False
            left = right
        return True

    def compare(self, operator: str, left: Any, right: Any) -> bool:
        if operator == "in":
            return self.contains(right, left)
        if operator == "not in":
            return not self.contains(right, left)
        for side in (left, right):
            if isinstance(side, (list, tuple, dict)):
                self.budget.walk(side)
        if operator == "==":
            return bool(left == right)
        if operator == "!=":
            return bool(left != right)
        for side in (left, right):
            if isinstance(side, Undefined):
                raise side.fault()
        if operator == "<":
            return bool(left < right)
        if operator == "<=":
            return bool(left <= right)
        if operator == ">":
            return bool(left > right)
        return bool(left >= right)

    def contains(self, container: Any, item: Any) -> bool:
        if isinstance(container, str):
            if not isinstance(item, str):
                raise TemplateFault(f"a {kind(item)} is never in a string")
            self.budget.spend(len(container) >> 7)
            return str.__contains__(container, item)
        if isinstance(container, dict):
            return not isinstance(item, (list, dict, Undefined)) and item in container
        return any(self.compare("==", item, other) for other in self.items(container))

    def _arithmetic(self, node: nodes.BinExpr) -> Any:
        return self._operate(node.operator, self._eval(node.left), self._eval(node.right))

    def _add(self, node: nodes.Add) -> Any:
        return self.add(self._eval(node.left), self._eval(node.right))

    def add(self, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, str):
            self.budget.string(len(left) + len(right))
            if isinstance(left, T.Safe) or isinstance(right, T.Safe):
                parts = (
                    side if isinstance(side, T.Safe) else escape(self, side)
                    for side in (left, right)
                )
                return T.safe(T.concat(tuple(parts)))
            return T.concat((left, right))
        if isinstance(left, list) and isinstance(right, list):
            self.budget.spend(len(left) + len(right))
            return self._own(left + right)
        if isinstance(left, tuple) and isinstance(right, tuple):
            self.budget.spend(len(left) + len(right))
            return left + right
        return self._operate("+", left, right)

    def _operate(self, operator: str, left: Any, right: Any) -> Any:
        for side in (left, right):
            if isinstance(side, Undefined):
                raise side.fault()
        if operator == "%" and isinstance(left, str):
            return percent(self, left, right)
        if operator == "*":
            for one, many in ((left, right), (right, left)):
                if isinstance(many, int) and isinstance(one, str):
                    self.budget.string(len(one) * max(0, many))
                    return T.uniform(str(one) * many, (one,))
                if isinstance(many, int) and isinstance(one, (list, tuple)):
                    self.budget.spend(len(one) * max(0, many))
                    made = one * many
                    return self._own(made) if isinstance(made, list) else made
        return _calculate(operator, _number(left), _number(right))

    def _getitem(self, node: nodes.Getitem) -> Any:
        value = self._eval(node.node)
        if isinstance(node.arg, nodes.Slice):
            part = node.arg
            start, stop, step = (
                None if bound is None else self._eval(bound)
                for bound in (part.start, part.stop, part.step)
            )
            return self._slice(value, start, stop, step)
        return self.item(value, self._eval(node.arg))

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, Undefined):
            raise value.fault()
        if not isinstance(value, (str, list, tuple)):
            raise TemplateFault(f"a slice of a {kind(value)}")
        if isinstance(value, str):
            if step in (None, 1):
                low, high, _ = slice(start, stop).indices(len(value))
                return T.cut(value, low, max(low, high))
            return T.uniform(str(value)[start:stop:step], (value,))
        self.budget.spend(len(value))
        made = value[start:stop:step]
        return self._own(made) if isinstance(made, list) else made

    def item(self, value: Any, key: Any) -> Any:
        """``value[key]``: an entry, else an attribute."""
        if isinstance(value, Undefined):
            raise value.fault()
        if isinstance(value, dict):
            if not isinstance(key, (list, dict, Undefined)) and key in value:
                return value[key]
        elif isinstance(value, (str, list, tuple)) and isinstance(key, int):
            if -len(value) <= key < len(value):
                if isinstance(value, str):
                    at = key % len(value)
                    return T.cut(value, at, at + 1)
                return value[key]
            return Undefined(f"item {key} of a {kind(value)} of {len(value)}")
        if isinstance(key, str):
            return self.attribute(value, key, items=False)
        return Undefined(f"{kind(value)} has no item {key!r}; it")

    def attribute(self, value: Any, name: str, items: bool = True) -> Any:
        """``value.name``: a method, else an entry."""
        if isinstance(value, Undefined):
            raise value.fault()
        if isinstance(value, Namespace):
            return value.values.get(name, Undefined(f"namespace entry '{name}'"))
        if isinstance(value, Loop):
            return value.get(name)
        methods = _METHODS.get(type(value))
        if methods is not None and name in methods:
            return Method(value, name)
        if items and isinstance(value, dict) and name in value:
            return value[name]
        return Undefined(f"{kind(value)} has no attribute {name!r}; it")

    def attribute_path(self, value: Any, path: Any) -> Any:
        """An attribute as filters name it: "function.name", or an index."""
        for part in path.split(".") if isinstance(path, str) else (path,):
            value = self.item(
                value, int(part) if isinstance(part, str) and part.isdigit() else part
            )
        return value

    def items(self, value: Any) -> list[Any]:
        """What a loop over ``value`` would see."""
        if isinstance(value, (list, tuple)):
            self.budget.spend(len(value))
            return list(value)
        if isinstance(value, dict):
            self.budget.spend(len(value))
            return list(value)
        if isinstance(value, str):
            self.budget.spend(len(value))
            return [T.cut(value, at, at + 1) for at in range(len(value))]
        if isinstance(value, Lazy):
            items, value.items = value.items, []
            self.budget.spend(len(items))
            return items
        if isinstance(value, Undefined):
            return []
        raise TemplateFault(f"a {kind(value)} cannot be looped over")

    # Calls --------------------------------------------------------------------------------------

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self._eval(argument) for argument in node.args]
        kwargs = {str(pair.key): self._eval(pair.value) for pair in node.kwargs}
        if node.dyn_args is not None:
            args += self.items(self._eval(node.dyn_args))
        if node.dyn_kwargs is not None:
            more = self._eval(node.dyn_kwargs)
            if not isinstance(more, dict):
                raise TemplateFault(f"** of a {kind(more)}")
            kwargs.update((str(key), value) for key, value in more.items())
        return args, kwargs

    def _filter(self, node: nodes.Filter, value: Any = None) -> Any:
        if node.node is not None:
            if isinstance(node.node, nodes.Filter):
                value = self._filter(node.node, value)
            else:
                value = self._eval(node.node)
        self.budget.spend(1)
        args, kwargs = self._arguments(node)
        return self.filter(node.name, value, args, kwargs)

    def filter(self, name: Any, value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.budget.spend(1)
        if name not in FILTERS:
            raise TemplateFault(f"there is no filter {name!r}")
        result = FILTERS[name](self, value, *args, **kwargs)
        return self._own(result) if type(result) is list else result

    def _test(self, node: nodes.Test) -> bool:
        args, kwargs = self._arguments(node)
        return self.test(node.name, self._eval(node.node), args, kwargs)

    def test(self, name: Any, value: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
        self.budget.spend(1)
        if name not in TESTS:
            raise TemplateFault(f"there is no test {name!r}")
        return bool(TESTS[name](self, value, *args, **kwargs))

    def _call(self, node: nodes.Call) -> Any:
        callee = self._eval(node.node)
        args, kwargs = self._arguments(node)
        return self._invoke(callee, args, kwargs)

    def _invoke(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(callee, _Macro):
            return self._call_macro(callee, args, kwargs)
        if isinstance(callee, Method):
            call = _METHODS[type(callee.owner)][callee.name]
            result = call(self, callee.owner, *args, **kwargs)
            return self._own(result) if type(result) is list else result
        if isinstance(callee, Function):
            return callee.call(*args, **kwargs)
        if isinstance(callee, Undefined):
            raise callee.fault()
        raise TemplateFault(f"a {kind(callee)} cannot be called")

    def _call_macro(self, macro: _Macro, args: list[Any], kwargs: dict[str, Any]) -> str:
        name = getattr(macro.node, "name", "caller")
        if self._depth >= self.budget.depth:
            raise TemplateFault(f"macro {name!r}: calls are nested deeper than {self.budget.depth}")
        values: dict[str, Any] = dict(zip(macro.names, args, strict=False))
        if "caller" in kwargs:
            values["caller"] = kwargs.pop("caller")
        for key in list(kwargs):
            if key in macro.names:
                if key in values:
                    raise TemplateFault(f"macro {name!r} got {key!r} twice")
                values[key] = kwargs.pop(key)
        values["varargs"] = tuple(args[len(macro.names) :])
        values["kwargs"] = kwargs
        outer_scope, outer_out, written = self._scope, self._out, self._written
        self._scope = _Scope(macro.scope, values)
        self._out, self._written = [], 0
        self._depth += 1
        try:
            first_default = len(macro.names) - len(macro.node.defaults)
            for at, argument in enumerate(macro.names):
                if argument not in values:
                    values[argument] = (
                        self._eval(macro.node.defaults[at - first_default])
                        if at >= first_default
                        else Undefined(f"parameter '{argument}' was not given; it")
                    )
            self._run(macro.node.body)
            return T.concat(self._out) if self._out else T.from_template("")
        finally:
            self._depth -= 1
            self._scope, self._out, self._written = outer_scope, outer_out, written

    # Functions ----------------------------------------------------------------------------------

    def _dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.budget.spend(len(kwargs))
        return dict(*args, **kwargs)

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        values = dict(args[0]) if args else {}
        return Namespace({**values, **kwargs})

    def _raise(self, message: Any = "") -> None:
        raise Raised(text_of(self, message)[:1000])

    def _range(self, *bounds: int) -> list[int]:
        numbers = range(*bounds)
        if len(numbers) > _MAX_RANGE:
            raise TemplateFault(f"range of {len(numbers)}; at most {_MAX_RANGE} are allowed")
        self.budget.spend(len(numbers))
        return list(numbers)

    def _strftime_now(self, pattern: str) -> str:
        # The C library would obey a width of a billion.
        if len(pattern) > 200 or not re.fullmatch(r"(?:[^%\0]|%[-#]?[A-Za-z%])*", pattern):
            raise TemplateFault(f"strftime_now cannot use {pattern[:200]!r}")
        return datetime.datetime.now().strftime(pattern)


_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    T.Safe: STRING_METHODS,
    T.Text: STRING_METHODS,
    dict: DICT_METHODS,
    list: LIST_METHODS,
    str: STRING_METHODS,
}

_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=",
    "in": "in", "notin": "not in",
}  # fmt: skip


def _number(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Undefined):
        raise value.fault()
    raise TemplateFault(f"a {kind(value)} is no number")


def _calculate(operator: str, left: Any, right: Any) -> Any:
    if operator == "**":
        if isinstance(left, int) and abs(right) * max(1, left.bit_length()) > _MAX_BITS:
            raise TemplateFault(f"{left} ** {right} is too large")
        return left**right
    for side in (left, right):
        if isinstance(side, int) and side.bit_length() > _MAX_BITS:
            raise TemplateFault("its numbers are too large")
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left / right
        case "//":
            return left // right
        case "%":
            return left % right
    raise TemplateFault(f"there is no operator {operator!r}")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [found for part in value.values() for found in _strings(part)]
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in _strings(part)]
    return []

"""Renders a template by walking its tree."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes

from . import filters, predicates
from . import origins as T
from .budget import Budget, Limits, TemplateFault
from .data import Data, number
from .methods import METHODS
from .printing import text_of
from .values import Function, Loop, Method, Namespace, Undefined, kind

__all__ = ["Evaluator", "Raised"]

_MAX_RANGE = 100_000


class Raised(TemplateFault):
    """The template called ``raise_exception``."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


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
        self._budget = Budget(limits, messages, characters)
        self._data = Data(self._budget, METHODS)
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
            nodes.Getattr: lambda node: self._data.attribute(self._eval(node.node), node.attr),
            nodes.Getitem: self._getitem,
            nodes.List: self._make_list,
            nodes.Mod: self._arithmetic,
            nodes.Mul: self._arithmetic,
            nodes.Name: self._name,
            nodes.Neg: lambda node: -number(self._eval(node.node)),
            nodes.Not: lambda node: not self._eval(node.node),
            nodes.Or: self._or,
            nodes.Pos: lambda node: +number(self._eval(node.node)),
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
            self._budget.spend(1)
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
            self._budget.output(self._written, len(piece))
            self._out.append(piece)

    def _output(self, node: nodes.Output) -> None:
        for child in node.nodes:
            if type(child) is nodes.TemplateData:
                self._write(child.data)
            else:
                self._write(text_of(self._budget, self._eval(child)))

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
            values = self._data.items(value)
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
        self._write(text_of(self._budget, self._filter(node.filter, self._capture(node.body))))

    def _break(self, node: nodes.Node) -> None:
        raise _Break

    def _continue(self, node: nodes.Node) -> None:
        raise _Continue

    def _if(self, node: nodes.If) -> None:
        if self._eval(node.test):
            self._run(node.body)
            return
        for branch in node.elif_:
            self._budget.spend(1)
            if self._eval(branch.test):
                self._run(branch.body)
                return
        self._run(node.else_)

    def _for(self, node: nodes.For) -> None:
        if node.recursive:
            raise TemplateFault("recursive loops are not supported")
        items = self._data.items(self._eval(node.iter))
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
                self._budget.spend(1)
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
        self._write(text_of(self._budget, self._invoke(self._eval(call.node), args, kwargs)))

    # Expressions --------------------------------------------------------------------------------

    def _eval(self, node: nodes.Node) -> Any:
        self._budget.spend(1)
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
        parts = [text_of(self._budget, self._eval(part)) for part in node.nodes]
        self._budget.string(sum(map(len, parts)))
        return T.concat(parts)

    def _make_list(self, node: nodes.List) -> list[Any]:
        return self._data.own([self._eval(item) for item in node.items])

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
            if not self._data.compare(_OPERATORS[operand.op], left, right):
                return False
            left = right
        return True

    def _arithmetic(self, node: nodes.BinExpr) -> Any:
        return self._data.operate(node.operator, self._eval(node.left), self._eval(node.right))

    def _add(self, node: nodes.Add) -> Any:
        return self._data.add(self._eval(node.left), self._eval(node.right))

    def _getitem(self, node: nodes.Getitem) -> Any:
        value = self._eval(node.node)
        if isinstance(node.arg, nodes.Slice):
            part = node.arg
            start, stop, step = (
                None if bound is None else self._eval(bound)
                for bound in (part.start, part.stop, part.step)
            )
            return self._data.slice(value, start, stop, step)
        return self._data.item(value, self._eval(node.arg))

    # Calls --------------------------------------------------------------------------------------

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self._eval(argument) for argument in node.args]
        kwargs = {str(pair.key): self._eval(pair.value) for pair in node.kwargs}
        if node.dyn_args is not None:
            args += self._data.items(self._eval(node.dyn_args))
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
        self._budget.spend(1)
        args, kwargs = self._arguments(node)
        return filters.apply(self._data, node.name, value, args, kwargs)

    def _test(self, node: nodes.Test) -> bool:
        args, kwargs = self._arguments(node)
        return predicates.test(self._data, node.name, self._eval(node.node), args, kwargs)

    def _call(self, node: nodes.Call) -> Any:
        callee = self._eval(node.node)
        args, kwargs = self._arguments(node)
        return self._invoke(callee, args, kwargs)

    def _invoke(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(callee, _Macro):
            return self._call_macro(callee, args, kwargs)
        if isinstance(callee, Method):
            call = METHODS[type(callee.owner)][callee.name]
            result = call(self._data, callee.owner, *args, **kwargs)
            return self._data.own(result) if type(result) is list else result
        if isinstance(callee, Function):
            return callee.call(*args, **kwargs)
        if isinstance(callee, Undefined):
            raise callee.fault()
        raise TemplateFault(f"a {kind(callee)} cannot be called")

    def _call_macro(self, macro: _Macro, args: list[Any], kwargs: dict[str, Any]) -> str:
        name = getattr(macro.node, "name", "caller")
        if self._depth >= self._budget.depth:
            raise TemplateFault(
                f"macro {name!r}: calls are nested deeper than {self._budget.depth}"
            )
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
        self._budget.spend(len(kwargs))
        return dict(*args, **kwargs)

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        values = dict(args[0]) if args else {}
        return Namespace({**values, **kwargs})

    def _raise(self, message: Any = "") -> None:
        raise Raised(text_of(self._budget, message)[:1000])

    def _range(self, *bounds: int) -> list[int]:
        numbers = range(*bounds)
        if len(numbers) > _MAX_RANGE:
            raise TemplateFault(f"range of {len(numbers)}; at most {_MAX_RANGE} are allowed")
        self._budget.spend(len(numbers))
        return list(numbers)

    def _strftime_now(self, pattern: str) -> str:
        # The C library would obey a width of a billion.
        if len(pattern) > 200 or not re.fullmatch(r"(?:[^%\0]|%[-#]?[A-Za-z%])*", pattern):
            raise TemplateFault(f"strftime_now cannot use {pattern[:200]!r}")
        return datetime.datetime.now().strftime(pattern)


_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=",
    "in": "in", "notin": "not in",
}  # fmt: skip


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [found for part in value.values() for found in _strings(part)]
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in _strings(part)]
    return []

"""What can be done with values, within the budget: compared, added, indexed, looped over."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import Any

from . import origins as T
from .budget import Budget, TemplateFault
from .printing import escape, percent
from .values import Lazy, Loop, Method, Namespace, Undefined, kind

__all__ = ["Data", "number"]

_MAX_BITS = 1024


class Data:
    """The operations of one rendering. ``methods``: by type and name, those that values have."""

    def __init__(
        self, budget: Budget, methods: Mapping[type, Mapping[str, Callable[..., Any]]]
    ) -> None:
        self.budget = budget
        self._methods = methods
        self._own: dict[int, list[Any]] = {}

    def own(self, made: list[Any]) -> list[Any]:
        """A list that the template made: it may change it."""
        self._own[id(made)] = made
        return made

    def check_own(self, value: list[Any]) -> list[Any]:
        """Only lists that the template made may be changed, never the caller's messages."""
        if id(value) not in self._own:
            raise TemplateFault("it changes a list that it was given")
        return value

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

    def add(self, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, str):
            self.budget.string(len(left) + len(right))
            if isinstance(left, T.Safe) or isinstance(right, T.Safe):
                parts = (
                    side if isinstance(side, T.Safe) else escape(self.budget, side)
                    for side in (left, right)
                )
                return T.safe(T.concat(tuple(parts)))
            return T.concat((left, right))
        if isinstance(left, list) and isinstance(right, list):
            self.budget.spend(len(left) + len(right))
            return self.own(left + right)
        if isinstance(left, tuple) and isinstance(right, tuple):
            self.budget.spend(len(left) + len(right))
            return left + right
        return self.operate("+", left, right)

    def operate(self, operator: str, left: Any, right: Any) -> Any:
        for side in (left, right):
            if isinstance(side, Undefined):
                raise side.fault()
        if operator == "%" and isinstance(left, str):
            return percent(self.budget, left, right)
        if operator == "*":
            for one, many in ((left, right), (right, left)):
                if isinstance(many, int) and isinstance(one, str):
                    self.budget.string(len(one) * max(0, many))
                    return T.uniform(str(one) * many, (one,))
                if isinstance(many, int) and isinstance(one, (list, tuple)):
                    self.budget.spend(len(one) * max(0, many))
                    made = one * many
                    return self.own(made) if isinstance(made, list) else made
        return _calculate(operator, number(left), number(right))

    def slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, Undefined):
            raise value.fault()
        if not isinstance(value, (str, list, tuple)):
            raise TemplateFault(f"a slice of a {kind(value)}")
        if isinstance(value, str):
            if step in (None, 1):
                low, high, _ = builtins.slice(start, stop).indices(len(value))
                return T.cut(value, low, max(low, high))
            return T.uniform(str(value)[start:stop:step], (value,))
        self.budget.spend(len(value))
        made = value[start:stop:step]
        return self.own(made) if isinstance(made, list) else made

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
        methods = self._methods.get(type(value))
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


def number(value: Any) -> Any:
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

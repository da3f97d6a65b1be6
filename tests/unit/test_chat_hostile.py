"""Templates come with model files: nothing in one may run code, hang or exhaust memory."""

from __future__ import annotations

import pytest
from triollama.chat import ChatTemplate, Limits
from triollama.errors import ChatTemplateError

USER = [{"role": "user", "content": "hello"}]
SMALL = Limits(steps=20_000, characters=50_000)

ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}"
    "{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}"
    "{{ a() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(35) }}",
    "default of itself": "{% macro m(x=m()) %}{% endmacro %}{{ m() }}",
    "growing list": "{% set l = [1] %}{% for i in range(99999) %}{% set _ = l.extend(l) %}"
    "{% endfor %}",
    "list of itself": "{% set l = [] %}{% set _ = l.append(l) %}{{ l }}",
    "list of itself as JSON": "{% set l = [] %}{% set _ = l.append(l) %}{{ l | tojson }}",
    "list compared": "{% set l = [] %}{% set _ = l.append(l) %}{% set k = [] %}"
    "{% set _ = k.append(k) %}{{ l == k }}",
    "shared list": "{% set ns = namespace(x=['a']) %}{% for i in range(30) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared list as JSON": "{% set ns = namespace(x=['a']) %}{% for i in range(30) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "long filter chain": "{% for i in range(9999) %}{{ range(9999) | map('string') | join }}"
    "{% endfor %}",
}

HUGE = {
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "times": "{{ 'x' * 10000000000 }}",
    "list times": "{{ [1] * 10000000000 }}",
    "range": "{{ range(10000000000) | list }}",
    "power": "{{ 10 ** 10000000000 }}",
    "product": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "center": "{{ 'x'.center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "indent": "{{ 'x\nx' | indent(10000000000) }}",
    "replace": "{% set x = 'x' * 40000 %}{{ x.replace('x', x) }}",
    "replace filter": "{% set x = 'x' * 40000 %}{{ x | replace('x', x) }}",
    "join": "{% set x = 'x' * 40000 %}{{ range(4000) | map('string') | join(x) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "strftime": "{{ strftime_now('%10000000000Y') }}",
    "round": "{{ 1.5 | round(10000000000) }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "JSON indent": "{{ [[1]] | tojson(indent=10000000000) }}",
    "captured": "{% set x %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
}

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "attr": "{{ ('' | attr('__class__')).x }}",
    "globals": "{{ range.__globals__.x }}",
    "macro globals": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__.x }}",
    "method": "{{ ''.join.__self__.x }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map attribute": "{{ ([''] | map(attribute='__class__.__mro__') | list)[0].x }}",
    "namespace": "{{ namespace.__init__.__globals__.x }}",
    "loop": "{% for i in [1] %}{{ loop.__class__.x }}{% endfor %}",
    "raise": "{{ raise_exception.__globals__.x }}",
    "self": "{{ self.__init__.x }}",
    "cycler": "{{ cycler.__init__.__globals__.x }}",
    "lipsum": "{{ lipsum.__globals__.os.popen('id').read() }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "change the messages": "{{ messages.append(1) }}",
    "empty the messages": "{{ messages.pop() }}",
    "change a message": "{{ messages[0].update({'role': 'system'}) }}",
    "encode": "{{ 'x'.encode('zip') }}",
}

DEEP = {
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "not": "{{ " + "not " * 5000 + "1 }}",
    "minus": "{{ " + "-" * 5000 + "1 }}",
    "plus": "{{ " + "1+" * 50_000 + "1 }}",
    "dots": "{{ messages" + ".a" * 50_000 + " }}",
    "filters": "{{ 1" + "|string" * 50_000 + " }}",
    "if": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "for": "{% for a in [1] %}" * 3000 + "{% endfor %}" * 3000,
    "else": "{{ " + "1 if 0 else " * 5000 + "1 }}",
    "too long": "x" * 1_000_001,
}

WRONG = {
    "syntax": "{% if %}",
    "open": "{{ 'x",
    "unknown tag": "{% frobnicate %}",
    "unknown filter": "{{ 1 | frobnicate }}",
    "unknown test": "{{ 1 is frobnicate }}",
    "undefined call": "{{ frobnicate() }}",
    "undefined entry": "{{ a.b.c }}",
    "division": "{{ 1 / 0 }}",
    "types": "{{ 1 + 'a' }}",
    "order": "{{ 1 < 'a' }}",
    "list as key": "{{ {[]: 1} }}",
    "arguments": "{{ 'a' | trim(1, 2, 3) }}",
    "break": "{% break %}",
    "print a function": "{{ range }}",
    "print a namespace": "{{ namespace() }}",
    "number text": "{{ ('9' * 900) | int * 1 }}",
}


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=f"{kind}: {name}")
        for kind, cases in {
            "endless": ENDLESS, "huge": HUGE, "escape": ESCAPES, "deep": DEEP, "wrong": WRONG,
        }.items()
        for name, source in cases.items()
    ],
)  # fmt: skip
def test_a_typed_error(source: str) -> None:
    messages = [dict(message) for message in USER]
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source, name="the one", limits=SMALL).render(messages, fit=False)
    assert caught.value.template == "the one"
    assert len(str(caught.value)) < 3000
    assert messages == USER


def test_default_limits_hold_too() -> None:
    for source in (ENDLESS["nested loops"], HUGE["output"], HUGE["doubling"]):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(source).render(USER, fit=False)


def test_ten_million_characters() -> None:
    with pytest.raises(ChatTemplateError, match="10000000 characters"):
        ChatTemplate("{{ 'x' * 10000000 }}").render(USER, fit=False)


def test_a_long_chat_is_no_attack() -> None:
    chat = [
        {"role": role, "content": "words " * 2000}
        for _ in range(500)
        for role in ("user", "assistant")
    ]
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    assert len(ChatTemplate(source).render(chat).text) > 10_000_000


def test_the_template_may_use_lists_of_its_own() -> None:
    source = "{% set l = [] %}{% set _ = l.append(messages[0].content) %}{{ l.pop(0) }}{{ l }}"
    assert ChatTemplate(source).render(USER).text == "hello[]"

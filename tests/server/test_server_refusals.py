"""Refusals show what was wrong, not all of it: every field of every request, with long values."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Site, run_fake

LONG = "x" * 50_000
VALUES: list[Any] = [LONG, [LONG], {LONG: 1}, {"type": LONG}, {"role": LONG}, [{LONG: 1}]]
VALUES += [[{"type": "function", "function": {"name": LONG, "parameters": 1}}], {"name": LONG}]

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAID = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {
        "model": "tiny", "messages": [
            SAID, {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "content": "1", "tool_call_id": "a"},
        ],
        "stop": ["z"], "tools": [TOOL], "tool_choice": "auto", "lora": [{"name": "a"}],
        "logit_bias": {"5": 1}, "samplers": ["top_k"], "seed": 1, "stream_options": {},
    }),
    ("/v1/chat/completions", {
        "messages": [SAID], "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}},
        },
    }),
    ("/v1/chat/completions", {"messages": [SAID], "grammar": 'root ::= "a"', "reasoning": None}),
    ("/v1/chat/completions", {"messages": [SAID], "chat_template_kwargs": {"a": 1}}),
    ("/v1/completions", {"prompt": ["Hi"], "regex": "a", "best_of": 1}),
    ("/v1/embeddings", {"input": ["Hi"], "pooling": "mean", "dimensions": 1}),
    ("/v1/responses", {
        "input": [
            {"type": "message", **SAID, "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "name": "f", "call_id": "a", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "1"},
        ],
        "tools": [{"type": "function", "name": "f"}], "tool_choice": "auto",
        "text": {"format": {"type": "text"}}, "previous_response_id": "", "include": [],
    }),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 5, "messages": [SAID], "system": "s",
        "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"},
    }),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": [SAID]}),
]  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """With each of VALUES in place of each part, and under a name of its own."""
    for new in VALUES:
        yield copy.deepcopy(new)
    if isinstance(value, dict):
        yield {**value, LONG: 1}
        yield {**value, "name": LONG, "type": LONG}
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, (dict, list)) else ():
        for changed in variants(value[key]):
            whole = copy.copy(value)
            whole[key] = changed
            yield whole


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=[path for path, _ in REQUESTS])
def test_refusals_are_short(path: str, body: dict[str, Any]) -> None:
    async def test(site: Site) -> None:
        for changed in variants(body):
            answer = await site.post(path, changed)
            assert answer.status_code < 500, answer.text[:300]
            assert answer.status_code == 200 or len(answer.content) < 4000, (
                json.dumps(changed)[:300], answer.text[:300],
            )  # fmt: skip

    run_fake(test)


def test_refusals_of_heads_are_short() -> None:
    async def test(site: Site) -> None:
        long = "x" * 20_000
        for path, headers in (
            (f"/{long}", {}), (f"/v1/models/{long}", {}), (f"/v1/responses/{long}", {}),
            ("/health", {"host": long}), ("/health", {"origin": long}),
            ("/conversations/" + long, {}),
        ):  # fmt: skip
            answer = await site.get(path, headers=headers)
            assert 400 <= answer.status_code < 500
            assert len(answer.content) < 4000

    run_fake(test)

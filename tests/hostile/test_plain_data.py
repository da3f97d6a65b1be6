"""What comes from elsewhere as JSON, wrong in one place: it is refused by name, or taken."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import triollama
from mutations import mutations
from triollama import files
from triollama._engine import Model
from triollama.chat import template_for_model
from triollama.testing import FakeEngine, open_fake_llama
from triollama.tuning import DataError, prepare_training_data

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
pytest.importorskip("h11", reason="the extra server")
from servers import Scripted, Site, run_fake

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Does.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "1"},
]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stop": ["."],
        "logit_bias": {"65": 1.0},
        "stream_options": {"include_usage": True},
        "lora": [],
        "metadata": {"a": "b"},
        "chat_template_kwargs": {"mood": "glad"},
        "max_tokens": 4,
        "seed": 1,
        "n": 1,
        "thinking": False,
    },
    "/v1/completions": {"prompt": ["Once", "Twice"], "max_tokens": 4, "logprobs": 2, "echo": False},
    "/v1/embeddings": {"input": ["Once"], "encoding_format": "base64", "dimensions": 4},
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "1"}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["."],
    },
    "/conversations/ann/fork": {"id": "bob"},
    "/conversations/ann/rewind": {"turns": 1},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_requests(path: str, tmp_path: Path) -> None:
    """Never the server's own fault, and nothing is left running."""

    async def test(site: Site) -> None:
        ann = {"X-Conversation-Id": "ann"}
        ask = {"messages": [{"role": "user", "content": "Hi"}]}
        assert (await site.post("/v1/chat/completions", ask, headers=ann)).status_code == 200
        seen, wrong = set(), []
        for place, body in mutations({"body": REQUESTS[path]}):
            content = json.dumps(body.get("body")).encode()
            answer = await site.ask("POST", path, content=content)
            seen.add(answer.status_code)
            if answer.status_code >= 500:
                wrong.append(place)
        assert not wrong
        assert {200, 400} <= seen
        assert site.llama.active() == []

    run_fake(test, Scripted(n_ctx=4096), folder=tmp_path)


ITEMS: list[dict[str, Any]] = [
    {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Done.", "weight": 1}],
        "tools": [TOOL],
        "chat_template_kwargs": {"mood": "glad"},
    },
    {
        "system": "s",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    },
    {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "system": "s",
        "history": [["d", "e"]],
    },
    {"prompt": [MESSAGES[1]], "completion": {"role": "assistant", "content": "b"}},
    {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]},
    {"text": "a"},
]


def test_training_items(tiny: Any) -> None:
    with Model(tiny("qwen3"), vocab_only=True) as model:
        template = template_for_model(model, "chatml")
        n_refused, wrong = 0, []
        for item in ITEMS:
            for place, made in mutations({"item": item}):
                try:
                    prepare_training_data(
                        [made.get("item")],
                        vocab=model.vocab,
                        template=template,
                        validation_split=0.0,
                    )
                except DataError:
                    n_refused += 1
                except Exception as error:
                    wrong.append((place, error))
        assert not wrong
        assert n_refused > 500


def test_saved_conversations(tmp_path: Path) -> None:
    """A file is refused, or its conversation goes on, back and anew."""

    async def main() -> None:
        fake = FakeEngine(lambda prompt: "Yes.", token_seconds=0.0, prompt_token_seconds=0.0)
        async with open_fake_llama(fake) as llama:
            chat = llama.conversation(
                "a", system="s", template="chatml", tools=[TOOL], variables={"mood": "glad"}
            )
            for text in ("One", "Two"):
                await chat.say(text, max_tokens=3)
            await llama.save(tmp_path / "chats")
            chat.close()
            plain = json.loads((tmp_path / "chats").read_bytes())
            wrong: list[Any] = []
            # Some of them: each compiles its grammars anew.
            for place, made in list(mutations({"conversations": plain["conversations"]}))[::40]:
                data = json.dumps({**plain, **made}).encode()
                try:
                    document = files.decode(data, verify=False)
                    chats = await llama.restore(document)
                except triollama.TriollamaError:
                    continue
                except Exception as error:
                    wrong.append((place, error))
                    continue
                for chat in chats:
                    for do in (chat.go_on, chat.regenerate, functools.partial(chat.say, "Three")):
                        try:
                            await do(max_tokens=3)
                        except triollama.TriollamaError:
                            pass
                        except Exception as error:
                            wrong.append((place, do, error))
                    chat.rewind(chat.n_turns)
                    chat.export()
                    chat.close()
            assert not wrong

    trio.run(main)

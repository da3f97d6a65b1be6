"""OpenAI's API, spoken by its own client, over the fake engine and a tiny model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import trio
import trio.testing
from servers import Scripted, Site, run_fake, run_native
from triollama import GenerationParams
from triollama._engine import Trainer
from triollama.answers import structured
from triollama.server import Limits
from triollama.testing import Reply

ASK = [{"role": "user", "content": "Hi"}]
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)


def test_a_chat_is_answered_whole() -> None:
    async def test(site: Site) -> None:
        done = await site.openai().chat.completions.create(model="tiny", messages=ASK)
        choice = done.choices[0]
        assert choice.message.content == "Hello there."
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert (done.object, done.model) == ("chat.completion", "tiny")
        assert done.usage.completion_tokens == len("Hello there.")
        assert done.usage.prompt_tokens == len(engine.prompts[0])
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        assert "Hi" in engine.prompts[0]

    engine = Scripted()
    run_fake(test, engine)


def test_a_chat_comes_in_pieces() -> None:
    async def test(site: Site) -> None:
        stream = await site.openai().chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in chunks}) == 1
        *texts, last, counts = chunks
        assert texts[0].choices[0].delta.role == "assistant"
        assert "".join(one.choices[0].delta.content for one in texts) == 'Say "hi"\n\u2028é'
        assert len(texts) > 5
        assert last.choices[0].finish_reason == "stop"
        assert all(chunk.usage is None for chunk in (*texts, last))
        assert (counts.choices, counts.usage.completion_tokens) == ([], 11)

    run_fake(test, Scripted('Say "hi"\n\u2028é'))


def test_without_include_usage_there_is_none() -> None:
    async def test(site: Site) -> None:
        body = {"messages": ASK, "stream": True}
        text = (await site.post("/v1/chat/completions", body)).text
        assert '"usage"' not in text
        assert text.endswith("data: [DONE]\n\n")

    run_fake(test)


def test_several_answers_have_seeds_of_their_own() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.chat.completions.create(model="tiny", messages=ASK, n=3, seed=7)
        assert [one.index for one in done.choices] == [0, 1, 2]
        assert sorted(one.seed for one in engine.params) == [7, 8, 9]
        assert done.usage.completion_tokens == 3 * len("Hello there.")
        assert done.usage.prompt_tokens == len(engine.prompts[0])
        stream = await client.chat.completions.create(model="tiny", messages=ASK, n=3, stream=True)
        texts, ends = {0: "", 1: "", 2: ""}, set()
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends.add(choice.index)
        assert set(texts.values()) == {"Hello there."}
        assert ends == {0, 1, 2}

    engine = Scripted()
    run_fake(test, engine)


def test_what_is_asked_for_reaches_the_engine() -> None:
    async def test(site: Site) -> None:
        await site.openai().chat.completions.create(
            model="tiny", messages=ASK, temperature=0.25, top_p=0.5, seed=11, stop=["there"],
            frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"65": -100},
            max_completion_tokens=99, user="ann",
            extra_body={"top_k": 7, "min_p": 0.125, "mirostat": 2, "repeat_penalty": 1.0,
                        "samplers": ["top_k", "temperature"], "grammar": 'root ::= "a"'},
        )  # fmt: skip
        params = engine.params[0]
        assert (params.temperature, params.top_p, params.seed) == (0.25, 0.5, 11)
        assert params.stop[0] == "there"
        assert (params.frequency_penalty, params.presence_penalty) == (0.5, -0.5)
        assert params.logit_bias == {65: -100}
        assert (params.max_tokens, params.top_k, params.min_p) == (99, 7, 0.125)
        assert (params.mirostat, params.samplers) == (2, ("top_k", "temperature"))
        assert params.grammar == 'root ::= "a"'
        await site.openai().chat.completions.create(
            model="tiny", messages=ASK, response_format={"type": "json_object"}
        )
        assert engine.params[1].grammar == structured(dict[str, Any]).grammar
        assert engine.params[1].temperature == 0.5  # the server's own

    engine = Scripted()
    run_fake(test, engine, params=GenerationParams(temperature=0.5))


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("chat", {"unheard_of": 1}, ""),
        ("chat", {"threads": 4}, ""),
        ("chat", {"temperature": -1}, "temperature"),
        ("chat", {"temperature": "hot"}, "temperature"),
        ("chat", {"top_p": 2}, "top_p"),
        ("chat", {"seed": -1}, "seed"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"n": 0}, "n"),
        ("chat", {"n": 65}, "n"),
        ("chat", {"max_tokens": -1}, "max_tokens"),
        ("chat", {"max_tokens": 1001}, "max_tokens"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat", {"logit_bias": [1]}, "logit_bias"),
        ("chat", {"response_format": {"type": "yaml"}}, "response_format.type"),
        ("chat", {"grammar": "root ::= ("}, ""),
        ("chat", {"store": True}, "store"),
        ("chat", {"lora": [{"name": "none"}]}, "lora"),
        ("chat", {"model": "gpt"}, "model"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "Hi"}, "messages"),
        ("chat", {"messages": [{"role": "ghost", "content": ""}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0]"),
        ("chat", {"messages": [{"role": "user", "content": "", "audio": {"id": 1}}]},
         "messages[0].audio"),
        ("chat", {"chat_template_kwargs": 1}, "chat_template_kwargs"),
        ("text", {"prompt": ""}, "prompt"),
        ("text", {"prompt": [-1]}, "tokens"),
        ("text", {"prompt": {}}, "prompt"),
        ("text", {"prompt": ["a", 1]}, "prompt"),
        ("text", {"prompt": []}, "prompt"),
        ("text", {"suffix": "end"}, ""),
        ("text", {"best_of": 2}, "best_of"),
        ("text", {"echo": True, "logprobs": 1}, "echo"),
        ("text", {"prompt": ["a"] * 65}, "n"),
        ("embed", {"input": ""}, "input"),
        ("embed", {"input": []}, "input"),
        ("embed", {"input": [1, 2]}, "input"),
        ("embed", {"dimensions": 3}, "dimensions"),
        ("embed", {"encoding_format": "hex"}, "encoding_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(path: str, changes: Any, param: str) -> None:
    paths = {
        "chat": ("/v1/chat/completions", {"messages": ASK}),
        "text": ("/v1/completions", {"prompt": "Once"}),
        "embed": ("/v1/embeddings", {"input": "Once"}),
    }

    async def test(site: Site) -> None:
        where, body = paths[path]
        for stream in (False, True) if path != "embed" else (False,):
            asked = {**body, **changes, **({"stream": True} if stream else {})}
            answer = await site.post(where, asked)
            assert answer.status_code == (404 if param == "model" else 400), answer.text
            error = answer.json()["error"]
            assert (error["param"] or "") == param, error
            assert all(name in error["message"] for name in changes if not param), error
            assert error["message"]
        assert site.llama.active() == []

    run_fake(test, limits=Limits(max_tokens=1000))


def test_log_probabilities_are_the_library_s(tiny: Any) -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        asked: dict[str, Any] = {
            "model": "tiny", "messages": ASK, "logprobs": True, "top_logprobs": 3,
            "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        done = await client.chat.completions.create(**asked)
        chunks = [one async for one in await client.chat.completions.create(**asked, stream=True)]
        streamed = [
            one for chunk in chunks if chunk.choices[0].logprobs
            for one in chunk.choices[0].logprobs.content
        ]  # fmt: skip
        whole = done.choices[0].logprobs.content
        chat = site.llama.conversation()
        reply = await chat.say("Hi", temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
        assert done.choices[0].message.content == reply.text
        assert [one.logprob for one in whole] == [one.logprob for one in streamed]
        assert len(whole) == 8
        for mine, theirs in zip(whole, reply.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob)
            assert bytes(mine.bytes) == site.llama.vocab.piece(theirs.token, True)
            assert [one.logprob for one in mine.top_logprobs] == pytest.approx(
                [logprob for _, logprob in theirs.top]
            )

    run_native(test, tiny("llama"))


def test_texts_are_completed_as_by_the_library(tiny: Any) -> None:
    async def test(site: Site) -> None:
        client, llama = site.openai(), site.llama
        asked: dict[str, Any] = {
            "model": "tiny", "temperature": 0, "max_tokens": 6,
            "extra_body": {"ignore_eos": True, "repeat_penalty": 1.0},
        }  # fmt: skip
        expected = [
            (await llama.generate(prompt, GREEDY, max_tokens=6, logprobs=2))
            for prompt in ("Once upon", "a time", [5, 6, 7])
        ]
        done = await client.completions.create(prompt=["Once upon", "a time"], **asked)
        assert [one.text for one in done.choices] == [one.text for one in expected[:2]]
        assert [one.finish_reason for one in done.choices] == ["length", "length"]
        assert done.usage.completion_tokens == 12
        done = await client.completions.create(prompt=[5, 6, 7], logprobs=2, **asked)
        assert done.choices[0].text == expected[2].text
        logprobs = done.choices[0].logprobs
        assert logprobs.token_logprobs == pytest.approx(
            [one.logprob for one in expected[2].logprobs]
        )
        assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 6
        stream = await client.completions.create(
            prompt=["Once upon", "a time"], stream=True, echo=True, **asked
        )
        texts = ["", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == ["Once upon" + expected[0].text, "a time" + expected[1].text]

    run_native(test, tiny("llama"))


def test_nobody_says_how_much() -> None:
    async def test(site: Site) -> None:
        done = await site.openai().completions.create(model="tiny", prompt="Once")
        assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (16, "length")

    run_fake(test, Scripted("x" * 100))


def test_embeddings_are_the_library_s(tiny: Any) -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        rows = await site.llama.embed(["one", "two"])
        for format in ("float", "base64"):
            found = await client.embeddings.create(
                model="tiny", input=["one", "two"], encoding_format=format
            )
            if format == "float":
                assert [one.embedding for one in found.data] == [
                    pytest.approx(row.tolist()) for row in rows
                ]
        found = await client.embeddings.create(model="tiny", input="one")  # base64, decoded
        assert found.data[0].embedding == pytest.approx(rows[0].tolist())
        assert found.usage.prompt_tokens == len(site.llama.tokenize("one"))

    run_native(test, tiny("llama"))


def test_models_and_adapters_have_names(tiny: Any, tmp_path: Any) -> None:
    path = tiny("llama")
    with Trainer(path, rank=2, seed=3) as trainer:
        trainer.save_adapter(tmp_path / "a.gguf")

    async def test(site: Site) -> None:
        llama, client = site.llama, site.openai()
        adapter = await llama.load_adapter(tmp_path / "a.gguf")
        site.server._service.adapters["poet"] = adapter
        models = [one.id for one in (await client.models.list()).data]
        assert models == ["tiny", "poet"]
        assert (await client.models.retrieve("poet")).parent == "tiny"
        with pytest.raises(openai.NotFoundError, match="tiny, poet"):
            await client.models.retrieve("gpt-4")
        asked: dict[str, Any] = {"prompt": "Once", "temperature": 0, "max_tokens": 8}
        more = {"ignore_eos": True, "repeat_penalty": 1.0}
        for model, lora, chosen in (
            ("poet", None, [(adapter, 1.0)]),
            ("tiny", [{"name": "poet", "scale": 2.5}], [(adapter, 2.5)]),
            ("tiny", None, []),
        ):
            expected = await llama.generate("Once", GREEDY, max_tokens=8, adapters=chosen)
            extra = more | ({"lora": lora} if lora else {})
            done = await client.completions.create(model=model, extra_body=extra, **asked)
            assert done.choices[0].text == expected.text
            assert done.model == model

    run_native(test, path)


def test_a_question_that_is_too_long() -> None:
    async def test(site: Site) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await site.openai().completions.create(model="tiny", prompt="x" * 100)
        assert caught.value.code == "context_length_exceeded"

    run_fake(test, Scripted(n_ctx=50))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told(stream: bool) -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        async with site.llama.stream("a"), site.llama.stream("b"):
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="tiny", messages=ASK, stream=stream)
        assert caught.value.response.headers["retry-after"] == "1"

    run_fake(test, Scripted(max_streams=1, max_queue=1, token_seconds=9.0))


def test_requests_have_a_limit_of_their_own() -> None:
    async def test(site: Site) -> None:
        async with await site.send({"messages": ASK}):
            await site.until(lambda now: now.running + now.prefilling == 1)
            with pytest.raises(openai.RateLimitError):
                await site.openai().embeddings.create(model="tiny", input="x")

    run_fake(test, Scripted(token_seconds=9.0), limits=Limits(requests=1))


def test_an_answer_has_a_limit_of_time() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="tiny", messages=ASK)
        assert caught.value.status_code == 504
        # On a slow machine it may be over before the stream has begun.
        with pytest.raises(openai.APIError, match=r"0\.05 s"):  # noqa: PT012
            stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
            async for _ in stream:
                pass
        assert site.llama.active() == []

    run_fake(test, Scripted("x" * 1000, token_seconds=0.01), limits=Limits(seconds=0.05))


def test_an_answer_that_fails_on_the_way() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="tiny", messages=ASK)
        assert (caught.value.status_code, "wires" in str(caught.value)) == (500, False)
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        texts = []
        with pytest.raises(openai.APIError, match="its log says why"):  # noqa: PT012
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
        assert "".join(texts) == "Hello"

    run_fake(test, Scripted(lambda prompt: Reply("Hello", error=RuntimeError("wires"))))


def test_an_engine_that_died() -> None:
    async def test(site: Site) -> None:
        assert (await site.get("/health")).json() == {"status": "ok"}
        engine.die("no power")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(openai.InternalServerError) as caught:
            await site.openai().chat.completions.create(model="tiny", messages=ASK)
        assert caught.value.status_code == 503
        health = await site.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "broken")

    engine = Scripted()
    run_fake(test, engine)


def test_what_clients_send_back_is_understood() -> None:
    """Answers as the client's own objects give them, with their null fields."""

    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.chat.completions.create(model="tiny", messages=ASK)
        history = [
            {"role": "system", "content": [{"type": "text", "text": "Be terse."}]},
            *ASK,
            done.choices[0].message,
            {"role": "user", "content": "More"},
        ]
        await client.chat.completions.create(model="tiny", messages=history)
        said = engine.prompts[1]
        assert [said.find(text) for text in ("Be terse.", "Hi", "Hello there.", "More")] == sorted(
            said.index(text) for text in ("Be terse.", "Hi", "Hello there.", "More")
        )

    engine = Scripted()
    run_fake(test, engine)


def test_an_answer_that_was_begun_goes_on() -> None:
    async def test(site: Site) -> None:
        begun = [*ASK, {"role": "assistant", "content": "Hello th"}]
        done = await site.openai().chat.completions.create(model="tiny", messages=begun)
        assert done.choices[0].message.content == "Hello there."
        assert engine.prompts[0].endswith("Hello th")

    engine = Scripted()
    run_fake(test, engine)


def test_beginnings_are_computed_once(tiny: Any) -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        long = [{"role": "system", "content": "Be terse and polite, always."}, *ASK]
        more = {"ignore_eos": True}
        for turn in range(2):
            done = await client.chat.completions.create(
                model="tiny", messages=long, max_tokens=4, temperature=0, extra_body=more
            )
            cached = done.usage.prompt_tokens_details.cached_tokens
            assert (cached > 16) == (turn == 1)
            answer = {"role": "assistant", "content": done.choices[0].message.content}
            long = [*long, answer, {"role": "user", "content": "And?"}]

    run_native(test, tiny("llama"))


def test_bodies_that_are_none() -> None:
    async def test(site: Site) -> None:
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"messages": \xff}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
        ):
            answer = await site.ask("POST", "/v1/chat/completions", content=content)
            assert answer.status_code == 400, (content, answer.text)
            assert answer.json()["error"]["message"]

    run_fake(test)


def test_metrics() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        await client.chat.completions.create(model="tiny", messages=ASK)
        await site.get("/nowhere")
        text = (await site.get("/metrics")).text
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        ok = 'triollama_requests_total{path="/v1/chat/completions",status="200"}'
        assert found[ok] == "1"
        assert found['triollama_requests_total{path="other",status="404"}'] == "1"
        assert found["triollama_generated_tokens_total"] == str(len("Hello there."))
        assert found["triollama_first_token_seconds_count"] == "1"
        assert found['triollama_first_token_seconds_bucket{le="+Inf"}'] == "1"
        assert {"triollama_queued", "triollama_running", "triollama_cells_used"} <= found.keys()
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        stems = {name.partition("{")[0] for name in found}
        assert {s.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
                for s in stems} == names  # fmt: skip

    run_fake(test)


def test_the_body_is_what_it_says() -> None:
    async def test(site: Site) -> None:
        answer = await site.post("/v1/chat/completions", {"messages": ASK})
        assert json.loads(answer.content) == answer.json()
        assert answer.headers["content-length"] == str(len(answer.content))

    run_fake(test)

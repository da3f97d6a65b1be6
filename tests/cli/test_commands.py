"""Commands that answer, look and convert, on tiny models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import click
import pytest
import triollama
from triollama._engine import Trainer
from triollama.cli.common import setting
from triollama.sync import Llama

SHORT = ("-n", "6", "-t", "0", "--seed", "1")


def test_it_answers_or_continues(command: Any, tiny: Any) -> None:
    path = tiny("llama")
    status, out, _ = command("run", "-m", path, *SHORT, "--raw", "the quick", "brown")
    with Llama(path) as llama:
        expected = llama.generate("the quick brown", max_tokens=6, temperature=0.0, seed=1)
    assert (status, out) == (0, expected.text + "\n")
    status, out, _ = command("run", "-m", path, *SHORT, "--chat", "--system", "s", "Hello")
    with Llama(path) as llama:
        chat = llama.chat(system="s", max_tokens=6, temperature=0.0, seed=1)
        assert (status, out) == (0, chat.say("Hello").text + "\n")


def test_results_as_json(command: Any, tiny: Any) -> None:
    status, out, err = command(
        "run", "-m", tiny("llama"), "--raw", "the", *SHORT, "--json", "-v",
        "--set", "logprobs", "1", "--set", "top_k", "5", "--set", "ignore_eos", "true",
    )  # fmt: skip
    done = json.loads(out)
    assert status == 0 and done["finish_reason"] == "length" and done["seed"] == 1
    assert len(done["tokens"]) == len(done["logprobs"]) == 6
    assert done["usage"]["generated_tokens"] == 6
    assert "6 written" in err and "seed 1" in err


def test_prompts_come_by_pipes(command: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    expected = command("run", "-m", path, *SHORT, "--raw", "say\n\nthe fox")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
    assert command("run", "-m", path, *SHORT, "--raw", "say", "-")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("say\n\nthe fox\n"))
    assert command("run", "-m", path, *SHORT, "--raw")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, _, err = command("run", "-m", path, "--raw")
    assert status == 2 and "the prompt is empty" in err


def test_a_reader_that_goes_ends_it(tiny: Any) -> None:
    words = ["run", "-m", str(tiny("llama")), "--raw", "-n", "4000", "the"]
    words += ["--set", "ignore_eos", "true", "--set", "context_overflow", "shift"]
    process = subprocess.Popen(
        [sys.executable, "-m", "triollama", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait() == 141
    assert b"Traceback" not in process.stderr.read()


def test_mistakes_are_explained(command: Any, tiny: Any, tmp_path: Path) -> None:
    path = tiny("llama")
    for status, says, *words in (
        (1, "ModelNotFoundError", "run", "-m", tmp_path / "absent.gguf", "x"),
        (1, "hf:google/gemma/FILE.gguf", "run", "-m", "google/gemma", "x"),
        (2, "no parameter 'top_q'", "run", "-m", path, "--set", "top_q", "1", "x"),
        (2, "top_k cannot be", "run", "-m", path, "--set", "top_k", "many", "x"),
        (2, "top_k cannot be", "run", "-m", path, "--set", "top_k", "[" * 100_000, "x"),
        (2, "--params", "serve", path, "--params", '{"stop": ' + "[" * 100_000),
        (1, "cannot be encoded as UTF-8", "run", "-m", path, "--raw", "caf\udce9"),
        (1, "ParameterError", "run", "-m", path, "-t", "-1", "x"),
        (2, "takes no --system", "run", "-m", path, "--raw", "--system", "s", "x"),
        (1, "cannot read the adapter", "run", "-m", path, "--adapter", tmp_path / "a=2", "x"),
        (2, "No such command", "walk"),
        (1, "neither hf:", "models", "absent"),
        (1, "ParameterError", "inspect", path, "--type-k", "q1"),
    ):
        got, _, err = command(*words)
        assert got == status and says in err, (words, err)
        assert "Traceback" not in err and len(err) < 3000


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("top_k", "20", 20),
        ("temperature", "0.5", 0.5),
        ("max_tokens", "null", None),
        ("ignore_eos", "true", True),
        ("stop", "END", ("END",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "12", ("12",)),
        ("stop_tokens", "[1, 2]", (1, 2)),
        ("logit_bias", '{"5": -1.5}', {5: -1.5}),
        ("grammar", 'root ::= "x"', 'root ::= "x"'),
    ],
)
def test_parameters_by_name(name: str, text: str, value: Any) -> None:
    assert setting(name, text) == value


def test_parameters_that_are_none() -> None:
    for name, text in (("top_k", "x"), ("ignore_eos", "maybe"), ("nothing", "1")):
        with pytest.raises(click.BadParameter):
            setting(name, text)


def test_inspect(command: Any, tiny: Any) -> None:
    status, out, _ = command("inspect", tiny("llama"), "--ctx", "512", "--streams", "2")
    assert status == 0
    for text in ("architecture  llama", "f32", "needs, for 512 tokens in each of 2", "it fits"):
        assert text in out
    status, out, _ = command("inspect", tiny("llama"), "--ctx", "512", "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] is True
    assert found["needs"][0]["cache"] == triollama.models.inspect(
        tiny("llama"), n_ctx=512
    ).needs[0].cache  # fmt: skip


def test_known_models_are_listed(command: Any) -> None:
    status, out, _ = command("models")
    assert status == 0 and "smollm2-135m-instruct" in out and "Apache-2.0" in out
    assert all(model.license in out for model in triollama.models.KNOWN.values())
    listed = json.loads(command("models", "--json")[1])
    assert {one["name"] for one in listed} == set(triollama.models.KNOWN)


def test_bench(command: Any, tiny: Any) -> None:
    status, out, _ = command(
        "bench", "-m", tiny("llama"), "--prompt", "20", "--new", "8", "--json"
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0 and found["read_per_second"] > 0 and found["written_per_second"] > 0
    assert "a second" in command("bench", "-m", tiny("llama"), "--prompt", "9", "--new", "4")[1]


def test_a_server(command: Any, tiny: Any) -> None:
    pytest.importorskip("h11", reason="the extra server")
    process = subprocess.Popen(
        [sys.executable, "-m", "triollama", "serve", str(tiny("llama")), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    with urllib.request.urlopen(f"{address}/health") as reply:
        assert reply.status == 200
    process.terminate()
    assert process.wait() == 0, process.communicate()
    status, _, err = command("serve", "--port", "x")
    assert status == 2 and "--port" in err


def test_converting(command: Any, tiny: Any, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    status, out, _ = command("quantize", tiny("llama"), target, "q8_0", "--json")
    assert status == 0 and json.loads(out) == {"path": str(target)}
    assert {one.type for one in triollama.models.inspect(target).tensors} >= {"q8_0"}


def test_a_merged_model_does_not_replace_its_adapter(
    command: Any, tiny: Any, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.gguf"
    with Trainer(tiny("llama"), rank=2) as trainer:
        trainer.save_adapter(adapter)
    before = adapter.read_bytes()
    status, _, err = command("merge", adapter, adapter, "-m", tiny("llama"))
    assert status == 2 and "adapter's own file" in err
    assert adapter.read_bytes() == before


def test_options_of_a_model_that_is_not_named(command: Any) -> None:
    for option in (["--update"], ["--revision", "x"]):
        status, _, err = command("models", *option)
        assert status == 2 and "none is named" in err
    assert command("chat", "-m", "")[0] == command("serve", "")[0] == 1  # as for all others


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_streams_that_are_closed(tiny: Any) -> None:
    run = f'"{sys.executable}" -m triollama run -m "{tiny("llama")}" --raw -n 2'
    for line, status in ((f"{run} the <&-", 0), (f"{run} <&-", 2), (f"{run} the >&-", 0)):
        done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, text=True)
        assert done.returncode == status
        assert "Traceback" not in done.stderr


def test_names_that_an_output_cannot_hold(tiny: Any, tmp_path: Path) -> None:
    for name, encoding, status in (("caf\u65e5", "latin-1", 0), ("caf\udce9", "utf-8", 1)):
        path = tmp_path / f"{name}.gguf"
        path.symlink_to(tiny("llama"))
        done = subprocess.run(
            [sys.executable, "-m", "triollama", "inspect", str(path), *["--json"] * status],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == status and b"Traceback" not in done.stderr
        assert b"/caf?.gguf" in done.stdout or b"is no utf-8" in done.stderr


def test_tables_that_nobody_reads() -> None:
    end, nobody = os.pipe()
    os.close(end)
    words = [sys.executable, "-m", "triollama", "models"]
    done = subprocess.run(words, check=False, stdout=nobody, stderr=subprocess.PIPE, text=True)
    os.close(nobody)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_while_it_is_imported(monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    class Interrupted:
        def find_spec(self, name: str, *more: Any) -> None:
            if name == "triollama.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "triollama.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert command("models")[::2] == (130, "interrupted\n")


def test_completion_is_offered(command: Any) -> None:
    for shell in ("bash", "zsh", "fish"):
        status, out, _ = command("completion", shell)
        assert status == 0 and "_TRIOLLAMA_COMPLETE" in out
    done = subprocess.run(
        [sys.executable, "-m", "triollama"], capture_output=True, text=True, check=False,
        env={"_TRIOLLAMA_COMPLETE": "bash_complete", "COMP_WORDS": "triollama in",
             "COMP_CWORD": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["plain,inspect"]


def test_version_and_help(command: Any) -> None:
    assert command("--version")[1].strip().endswith(triollama.__version__)
    status, out, _ = command("--help")
    assert status == 0
    for name in ("run", "chat", "inspect", "models", "train", "evaluate", "compare", "merge"):
        assert f"  {name} " in out


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    status, _, err = command("--help")
    assert status == 1 and "pip install 'triollama[cli]'" in err


def test_tuning_from_a_shell(command: Any, tiny: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"What is {a}?", "completion": f"{a}{a}"} for a in "abcdef"]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model, adapter = tiny("llama"), tmp_path / "adapter.gguf"
    status, out, err = command(
        "train", data, "--model", model, "--as-chat", "--adapter", adapter, "--rank", "2",
        "--learning-rate", "0.05", "--epochs", "2", "--threads", "2",
    )  # fmt: skip
    assert status == 0, out + err
    assert adapter.exists()
    words = ("-m", model, "--chat", *SHORT, "What is a?")
    assert command("run", *words, "--adapter", adapter)[1] != command("run", *words)[1]
    assert command("run", *words, "--adapter", f"{adapter}=0")[1] == command("run", *words)[1]

    merged = tmp_path / "merged.gguf"
    status, out, err = command("merge", adapter, merged, "-m", model, "--json")
    assert status == 0, err
    tuned = command("run", *words, "--adapter", adapter)[1]
    assert command("run", "-m", merged, *words[2:])[1] == tuned
    folder = tmp_path / "peft"
    assert command("export", adapter, folder, "-m", model)[0] == 0
    assert (folder / "adapter_config.json").exists()
    assert command("evaluate", data, "--model", model, "--as-chat", "--adapter", adapter)[0] == 0
    status, _, err = command("train", data)
    assert status == 2 and "--adapter" in err
    status, _, err = command("merge", adapter, merged, "-m", tiny("gemma3"))
    assert status == 1 and "IncompatibleAdapterError" in err


def test_what_is_not_utf_8_is_told(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    for words in (("run", "-m", path, *SHORT, "--raw"), ("chat", "-m", path, "--no-history")):
        latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", latin)
        status, _, err = command(*words)
        assert status == 1 and "the input is not utf-8" in err and "0xe9" in err
    (tmp_path / "a.gbnf").write_bytes(b'root ::= "caf\xe9"')
    status, _, err = command("run", "-m", path, "--grammar", tmp_path / "a.gbnf", "x")
    assert status == 2 and "a.gbnf is not UTF-8" in err


def test_the_environment_s_model_is_every_command_s(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = tmp_path / "absent.gguf"
    monkeypatch.setenv("TRIOLLAMA_MODEL", str(absent))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "hello"}\n')
    for words in (
        ("run", "x"),
        ("chat",),
        ("serve",),
        ("inspect",),
        ("bench",),
        ("train", data, "--adapter", tmp_path / "a.gguf"),
        ("evaluate", data),
        ("compare", tmp_path / "a.gguf", "x"),
    ):
        status, _, err = command(*words)
        assert (status, str(absent) in err) == (1, True), (words, err)


def test_options_of_training_are_explained(command: Any, tiny: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "hello"}\n')
    train = ("train", data, "--model", tiny("llama"), "--adapter", tmp_path / "a.gguf")
    for status, says, *words in (
        (1, "rank cannot be 'many'", *train, "--rank", "many"),
        (1, "max_steps cannot be '1.5'", *train, "--max-steps", "1.5"),
        (2, "no number of items", *train, "--validation", data, "--validation-limit", "-1"),
        (2, "no number of items", "evaluate", data, "--limit", "x"),
    ):
        got, _, err = command(*words)
        assert (got, says in err) == (status, True), (words, err)
        assert "Traceback" not in err

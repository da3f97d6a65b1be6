"""What must hold of training steps, whatever the model: on tiny models, without PyTorch."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import ARCHITECTURES
from triollama import _engine
from triollama.errors import (
    AdapterError,
    BusyError,
    ClosedError,
    DecodeAborted,
    ModelFormatError,
    ModelNotFoundError,
    ParameterError,
    TriollamaError,
    UnsupportedError,
)


def example(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(5, 480, n).astype(np.int32)
    labels = np.append(tokens[1:], -1).astype(np.int32)
    labels[: n // 4] = -1
    return tokens, labels


def warm(trainer: Any, seed: int = 1) -> None:
    """Give B values: at zero, A has no gradient."""
    noise = np.random.default_rng(seed).normal(0.0, 0.02, trainer.n_parameters)
    trainer.set("weights", trainer.get("weights") + noise.astype(np.float32))


def gradients(trainer: Any, *rows: tuple[Any, ...], **options: Any) -> np.ndarray:
    trainer.clear_gradients()
    for tokens, labels, *rest in rows:
        trainer.forward_backward(tokens, labels, **(rest[0] if rest else {}), **options)
    return np.array(trainer.get("gradients"))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def trainer(tiny: Any) -> Any:
    with _engine.Trainer(tiny("gemma3"), rank=4, alpha=8.0, threads=2) as trainer:
        warm(trainer)
        yield trainer


# ---- the start


def test_an_adapter_starts_without_effect_and_as_peft_draws_it(tiny: Any) -> None:
    path = tiny("llama")
    tokens, labels = example(30)
    with _engine.Trainer(path, rank=4, seed=1) as one, _engine.Trainer(path, rank=8, seed=2) as two:
        assert one.evaluate(tokens, labels).loss == two.evaluate(tokens, labels).loss
        values, at = one.get("weights"), 0
        for _, shape_a, shape_b in one.layout:
            size_a, size_b = np.prod(shape_a), np.prod(shape_b)
            a, b = values[at : at + size_a], values[at + size_a : at + size_a + size_b]
            at += size_a + size_b
            bound = 1 / np.sqrt(shape_a[1])
            assert np.abs(a).max() <= bound
            assert np.abs(a).std() == pytest.approx(bound / np.sqrt(12), rel=0.2)
            assert not b.any()
        assert at == one.n_parameters == values.size


def test_the_seed_decides_the_start(tiny: Any) -> None:
    def start(seed: int) -> bytes:
        with _engine.Trainer(tiny("llama"), rank=2, seed=seed) as trainer:
            return bytes(trainer.get("weights").tobytes())

    assert start(1) == start(1)
    assert start(1) != start(2)


# ---- losses and gradients


def test_masked_labels_change_nothing(trainer: Any) -> None:
    tokens, labels = example(40)
    loss = trainer.evaluate(tokens, labels)
    # A label without weight is masked, whatever it says.
    masked = labels < 0
    assert masked.sum() > 5
    weights = np.where(masked, 0.0, 1.0 / (~masked).sum()).astype(np.float32)
    slope = gradients(trainer, (tokens, labels))
    for seed in range(3):
        others = np.random.default_rng(seed).integers(5, 480, len(labels))
        shown = np.where(masked, others, labels).astype(np.int32)
        again = gradients(trainer, (tokens, shown, {"weights": weights}))
        assert relative_error(again, slope) <= 1e-6
    assert len(loss.nll) == len(loss.predicted) == (labels >= 0).sum()
    assert loss.loss == pytest.approx(loss.nll.mean(), rel=1e-6)
    # A token after the last label is seen by none.
    later = tokens.copy()
    later[-1] = (later[-1] + 1) % 480
    last = labels.copy()
    last[-2] = -1
    assert trainer.evaluate(later, last).loss == trainer.evaluate(tokens, last).loss


@pytest.mark.parametrize("n_vocab", [480, 2050])  # blocks of 2048 rows are looked at in turn
@pytest.mark.parametrize("kernel", ["portable", "ggml", None])
def test_predicted_is_the_likeliest_token_of_decoding(
    tiny: Any, n_vocab: int, kernel: str | None
) -> None:
    path = tiny("llama", n_vocab=n_vocab)
    tokens = np.random.default_rng(n_vocab).integers(5, n_vocab, 40).astype(np.int32)
    labels = np.append(tokens[1:], -1).astype(np.int32)
    with _engine.Trainer(path, rank=1, kernel=kernel) as trainer:
        predicted = trainer.evaluate(tokens, labels).predicted
    with (
        _engine.Model(path) as model,
        _engine.Context(model, type_k="f32", type_v="f32", flash_attn="off") as context,
    ):
        batch = _engine.Batch(len(tokens))
        for i, token in enumerate(tokens):
            batch.add(int(token), i, 0, True)
        context.decode(batch)
        expected = [int(context.logits(int(i)).argmax()) for i in np.flatnonzero(labels >= 0)]
    assert list(predicted) == expected


def test_accumulating_rows_equals_one_batch(trainer: Any) -> None:
    rows = [example(n, seed=n) for n in (20, 35, 50)]
    total = sum(int((labels >= 0).sum()) for _, labels in rows)
    weighted = [(t, y, {"weights": np.full(len(t), 1 / total, np.float32)}) for t, y in rows]
    together = gradients(trainer, *weighted)
    alone = sum(gradients(trainer, row) for row in weighted)
    assert relative_error(together, np.asarray(alone)) <= 1e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_separate(tiny: Any, arch: str) -> None:
    rows = [example(n, seed=n) for n in (25, 40, 18)]
    tokens, labels = (np.concatenate(part) for part in zip(*rows, strict=True))
    lengths = [len(t) for t, _ in rows]
    where = {
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "segments": np.repeat(np.arange(3), lengths),
    }
    with _engine.Trainer(tiny(arch), rank=4, threads=2) as trainer:
        warm(trainer)
        weight = 1.0 / (labels >= 0).sum()
        separate = [(t, y, {"weights": np.full(len(t), weight)}) for t, y in rows]
        assert (
            relative_error(
                gradients(trainer, (tokens, labels, where)), gradients(trainer, *separate)
            )
            <= 1e-5
        )
        nll = np.concatenate([trainer.evaluate(t, y).nll for t, y in rows])
        np.testing.assert_allclose(trainer.evaluate(tokens, labels, **where).nll, nll, atol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 37, 128, 300])
def test_every_pair_gets_a_gradient_at_any_length(trainer: Any, length: int) -> None:
    tokens = example(length)[0]
    labels = np.roll(tokens, -1)
    trainer.clear_gradients()
    trainer.forward_backward(tokens, labels)
    values, at = trainer.get("gradients"), 0
    for name, *shapes in trainer.layout:
        for shape in shapes:
            norm = np.linalg.norm(values[at : at + np.prod(shape)])
            at += np.prod(shape)
            # One token attends to itself alone: its query and key do not matter.
            silent = length == 1 and ("attn_q." in name or "attn_k." in name)
            assert (norm < 1e-6) if silent else (norm > 1e-6), name


def test_the_gradient_is_the_slope_of_the_loss(trainer: Any) -> None:
    tokens, labels = example(40)
    slope = gradients(trainer, (tokens, labels)).astype(np.float64)
    start = trainer.get("weights")
    direction = slope / np.linalg.norm(slope)
    losses = []
    for sign in (1, -1):
        trainer.set("weights", (start + sign * 1e-2 * direction).astype(np.float32))
        losses.append(trainer.evaluate(tokens, labels).loss)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(np.linalg.norm(slope), rel=1e-2)


def test_gradients_do_not_pile_up_from_step_to_step(trainer: Any) -> None:
    tokens, labels = example(30)
    norms = []
    for _ in range(4):
        trainer.forward_backward(tokens, labels)
        norms.append(trainer.gradient_norm())
        trainer.adamw_step(0.0)
    assert norms == [norms[0]] * 4
    assert not trainer.get("gradients").any()


def test_a_constant_gradient_moves_equally_every_step(trainer: Any) -> None:
    gradient = np.random.default_rng(0).normal(size=trainer.n_parameters).astype(np.float32)
    moves = []
    for _ in range(5):
        before = trainer.get("weights")
        trainer.set("gradients", gradient)
        trainer.adamw_step(1e-3)
        moves.append(np.linalg.norm(trainer.get("weights") - before))
    # Adam's steps are the learning rate in every coordinate as long as the gradient stays.
    np.testing.assert_allclose(moves, 1e-3 * np.sqrt(trainer.n_parameters), rtol=1e-3)


def test_adamw_is_the_published_one(trainer: Any) -> None:
    rng = np.random.default_rng(0)
    w = trainer.get("weights").astype(np.float64)
    m = v = np.zeros_like(w)
    for step in range(1, 4):
        g = rng.normal(size=w.size).astype(np.float32)
        trainer.set("gradients", g)
        trainer.adamw_step(1e-2, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * np.square(g, dtype=np.float64)
        w = w * (1 - 1e-3) - 1e-2 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6)
        np.testing.assert_allclose(trainer.get("weights"), w, atol=1e-6)
    np.testing.assert_allclose(trainer.get("first_moments"), m, atol=1e-6)
    np.testing.assert_allclose(trainer.get("second_moments"), v, atol=1e-6)
    assert trainer.step == 3


def test_learning_rate_zero_changes_no_weight(trainer: Any) -> None:
    before = trainer.get("weights")
    trainer.forward_backward(*example(20))
    trainer.adamw_step(0.0, weight_decay=0.5)
    assert np.array_equal(trainer.get("weights"), before)


def test_clipping_scales_the_whole_gradient(trainer: Any) -> None:
    trainer.forward_backward(*example(20))
    before, norm = trainer.get("gradients"), trainer.gradient_norm()
    assert norm == pytest.approx(np.linalg.norm(before.astype(np.float64)), rel=1e-6)
    trainer.scale_gradients(0.5 / norm)
    assert trainer.gradient_norm() == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(trainer.get("gradients"), before * (0.5 / norm), rtol=1e-5)


@pytest.mark.parametrize("kernel", ["ggml", None])
@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K"])
def test_fast_mode_points_where_exact_mode_points(
    tiny: Any, dtype: str, kernel: str | None
) -> None:
    tokens, labels = example(50)
    found = []
    for precision in ("exact", "fast"):
        options = {"rank": 4, "precision": precision, "threads": 2, "kernel": kernel}
        with _engine.Trainer(tiny("gemma3", dtype=dtype), **options) as trainer:
            warm(trainer)
            found.append(
                (trainer.evaluate(tokens, labels).loss, gradients(trainer, (tokens, labels)))
            )
    (exact_loss, exact), (fast_loss, fast) = found
    if kernel or "tiles" in _engine.training_kernels():  # else it may be the same
        assert fast_loss != exact_loss
    assert fast_loss == pytest.approx(exact_loss, rel=0.02)
    assert fast @ exact / np.linalg.norm(fast) / np.linalg.norm(exact) > 0.98


@pytest.mark.parametrize("length", [1, 5, 37, 130])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_every_way_of_multiplying_gives_the_same(tiny: Any, dtype: str, length: int) -> None:
    tokens = example(length)[0]
    labels = np.roll(tokens, -1)
    found = {}
    for kernel in _engine.training_kernels():
        rounds = kernel in ("dots", "tiles")
        precision = "fast" if rounds else "exact"
        options = {"rank": 4, "precision": precision, "threads": 2, "kernel": kernel}
        with _engine.Trainer(tiny("gemma3", dtype=dtype), **options) as trainer:
            assert trainer.kernel == kernel
            warm(trainer)
            loss = trainer.evaluate(tokens, labels).loss
            found[kernel] = loss, gradients(trainer, (tokens, labels))
    loss, slope = found.pop("ggml")
    for kernel, (its_loss, its_slope) in found.items():
        rounds = kernel in ("dots", "tiles")
        assert its_loss == pytest.approx(loss, rel=3e-3 if rounds else 1e-5), kernel
        assert relative_error(its_slope, slope) <= (0.05 if rounds else 2e-5), kernel


@pytest.mark.parametrize("ftype", ["q5_0", "q5_1", "q6_k", "q3_k_m", "iq4_nl"])
def test_every_quantised_type_is_read_as_ggml_reads_it(
    tiny: Any, tmp_path: Path, ftype: str
) -> None:
    path = tmp_path / "quantised.gguf"
    _engine.quantize(tiny("llama", n_embd=256), path, ftype=ftype)
    tokens, labels = example(40)
    found = []
    for kernel in ("ggml", "vector"):
        if kernel not in _engine.training_kernels():
            pytest.skip("this build has no kernels of its own")
        with _engine.Trainer(path, rank=4, kernel=kernel, threads=2) as trainer:
            warm(trainer)
            found.append(gradients(trainer, (tokens, labels)))
    assert relative_error(found[1], found[0]) <= 2e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_threads_do_not_change_a_bit(tiny: Any, precision: str) -> None:
    tokens, labels = example(70)
    found = []
    for threads in (1, 2, 5):
        options = {"rank": 4, "precision": precision, "threads": threads}
        with _engine.Trainer(tiny("qwen3", dtype="Q8_0"), **options) as trainer:
            if trainer.kernel == "ggml":
                pytest.skip("ggml's own products promise nothing about threads")
            warm(trainer)
            found.append(gradients(trainer, (tokens, labels)))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_kept_for_the_way_back_changes_no_bit(tiny: Any, arch: str) -> None:
    """All of it, some, or nothing but what layers were given."""
    rows = [example(n, seed) for seed, n in enumerate((40, 23))]  # the places are made anew
    for kernel in (None, "portable"):
        found, costs = [], []
        for room in (1 << 27, 30_000, 0):
            with _engine.Trainer(
                tiny(arch), rank=4, dropout=0.1, seed=3, threads=2, kernel=kernel, kept_bytes=room
            ) as trainer:
                warm(trainer)
                losses = [trainer.evaluate(*rows[0]).loss]
                of_rows = gradients(trainer, *rows)
                losses += [trainer.evaluate(*row).loss for row in rows]
                trainer.adamw_step(1e-2)
                nodes = sum(count for _, count in trainer.profile(*rows[0]).values())
                found.append((losses, of_rows, np.array(trainer.get("gradients"))))
                costs.append((trainer.memory["activations"], nodes))
            for one, other in zip(found[0], found[-1], strict=True):
                assert np.array_equal(one, other)
        (bytes_kept, fewest), _, (bytes_bare, most) = costs
        assert bytes_kept > bytes_bare
        assert fewest < most


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_kept_changes_no_bit_where_one_matrix_has_an_adapter(
    tiny: Any, arch: str, precision: str
) -> None:
    """A product without an adapter is what is kept; a sum that takes it in where it is not kept
    rounds no earlier."""
    row = example(40)
    with _engine.Trainer(tiny(arch), rank=2) as trainer:
        names = trainer.targets
    for name in names:
        found = []
        for room in (1 << 27, 0):
            options = {"rank": 2, "targets": (name,), "precision": precision, "kept_bytes": room}
            with _engine.Trainer(tiny(arch), **options) as trainer:
                warm(trainer)
                found.append(gradients(trainer, row))
        assert np.array_equal(*found), name


def test_serving_goes_on_as_before_beside_training(tiny: Any) -> None:
    """On processors with matrix tiles both sides configure them, each for itself."""
    path = tiny("llama", dtype="Q8_0")
    batch = _engine.Batch(40)
    for i in range(40):
        batch.add(5 + i, i, 0, True)
    with (
        _engine.Trainer(path, rank=4, precision="fast", threads=2) as trainer,
        _engine.Model(path) as model,
        _engine.Context(model, n_ctx=256, n_threads=2, n_threads_batch=2) as context,
    ):
        logits = []
        for _ in range(3):
            context.memory.clear()
            context.decode(batch)
            logits.append(context.logits(39, copy=True))
            trainer.forward_backward(*example(40))
        assert np.array_equal(logits[0], logits[1])
        assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_graphs_for_gpus_have_contiguous_operands_and_no_code_of_ours(
    tiny: Any, arch: str
) -> None:
    options = {"rank": 4, "kernel": "portable", "dropout": 0.1}
    with _engine.Trainer(tiny(arch, dtype="Q8_0"), **options) as trainer:
        found = trainer.audit(40)
        before = trainer.get("weights")
        assert trainer.step == trainer.dropout_counter == 0
        assert not trainer.get("gradients").any()
        assert np.array_equal(trainer.get("weights"), before)
    kinds = {each.operation.split("(")[0]: each for each in found}
    assert "CUSTOM" not in kinds and "OUT_PROD" not in kinds
    assert {"MUL_MAT", "GET_ROWS", "SOFT_MAX_BACK", "OPT_STEP_ADAMW"} <= set(kinds)
    # Only what moves values takes views; nothing that computes does.
    views = [each.operation for each in found if not each.contiguous]
    assert {name.split("(")[0] for name in views} <= {"CONT", "CPY"}, views
    # Quantised weights are read by row lookup alone, and multiplied as F32.
    quantised = {e.operation.split("(")[0] for e in found if "q8_0" in e.operation}
    assert quantised == {"GET_ROWS"}
    assert all(each.supported for each in found)


def test_the_audit_names_what_a_backend_leaves_to_the_cpu(trainer: Any) -> None:
    everything = {each.operation: each.nodes for each in trainer.audit(16)}
    lacking = [e for e in trainer.audit(16, missing=("ROPE_BACK", "SILU")) if not e.supported]
    assert {e.operation.split("(")[0] for e in lacking} == {"ROPE_BACK", "SILU"}
    for each in lacking:
        assert each.nodes == everything[each.operation] > 0
    per_layer = {name: n for name, n in everything.items() if name.startswith("ROPE_BACK")}
    assert sum(per_layer.values()) == 2 * trainer.n_layer  # Q and K
    adamw = sum(n for name, n in everything.items() if name.startswith("OPT_STEP_ADAMW"))
    assert adamw == 2 * len(trainer.layout)
    for n_tokens in (0, 2**21):
        with pytest.raises(ParameterError):
            trainer.audit(n_tokens)


def test_a_profile_accounts_for_the_work_and_changes_nothing(trainer: Any) -> None:
    tokens, labels = example(40)
    trainer.forward_backward(tokens, labels)
    expected = trainer.get("gradients")
    trainer.clear_gradients()
    found = trainer.profile(tokens, labels)
    assert np.array_equal(trainer.get("gradients"), expected)
    assert all(seconds >= 0 and calls > 0 for seconds, calls in found.values())
    products = [kind for kind in found if kind.startswith(("PRODUCT ", "MUL_MAT "))]
    assert products
    again = trainer.profile(tokens, labels)
    assert {k: n for k, (_, n) in again.items()} == {k: n for k, (_, n) in found.items()}


def test_rslora_scales_by_the_root_of_the_rank(tiny: Any) -> None:
    path = tiny("llama")
    tokens, labels = example(30)
    with (
        _engine.Trainer(path, rank=4, alpha=8.0, rslora=True) as root,
        _engine.Trainer(path, rank=4, alpha=16.0) as plain,
    ):
        values = plain.get("weights") + 0.01
        root.set("weights", values)
        plain.set("weights", values)
        assert root.evaluate(tokens, labels).loss == plain.evaluate(tokens, labels).loss


@pytest.mark.parametrize("targets", [("attn_q",), ("ffn_down", "attn_k")])
def test_only_the_targets_are_trained(tiny: Any, targets: tuple[str, ...]) -> None:
    with _engine.Trainer(tiny("qwen3"), rank=2, targets=targets) as trainer:
        assert trainer.targets == targets
        assert {name.split(".")[2] for name, *_ in trainer.layout} == set(targets)
        tokens, labels = example(30)
        first = trainer.evaluate(tokens, labels).loss
        for _ in range(5):
            last = trainer.forward_backward(tokens, labels).loss
            trainer.adamw_step(1e-2)
        assert last < first


# ---- state


def test_dropout_and_steps_resume_bit_for_bit(tiny: Any) -> None:
    path = tiny("llama")
    rows = [example(30, seed=i) for i in range(6)]

    def run(trainer: Any, some: list[Any]) -> None:
        for tokens, labels in some:
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(1e-2, weight_decay=0.01)

    options = {"rank": 4, "seed": 5, "dropout": 0.3, "threads": 2}
    parts = ("weights", "first_moments", "second_moments")
    with _engine.Trainer(path, **options) as whole:
        run(whole, rows)
        expected = [whole.get(part) for part in parts]
        assert whole.dropout_counter == 6
    with _engine.Trainer(path, **options) as first:
        run(first, rows[:3])
        saved = [first.get(part) for part in parts], first.step, first.dropout_counter
    with _engine.Trainer(path, **options) as second:
        for part, values in zip(parts, saved[0], strict=True):
            second.set(part, values)
        second.restore_counters(saved[1], saved[2])
        run(second, rows[3:])
        for part, values in zip(parts, expected, strict=True):
            assert np.array_equal(second.get(part), values), part


def test_the_base_file_is_only_read(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    shutil.copy(tiny("gemma3", dtype="Q8_0"), path)
    path.chmod(0o444)
    before = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    with _engine.Trainer(path, rank=4) as trainer:
        for _ in range(3):
            trainer.forward_backward(*example(30))
            trainer.adamw_step(1e-2)
    assert (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) == before


def test_an_adapter_comes_back_as_it_was_saved(tiny: Any, tmp_path: Path) -> None:
    path, saved = tiny("phi3"), tmp_path / "a.gguf"
    with _engine.Trainer(path, rank=4, seed=1) as one, _engine.Trainer(path, rank=4, seed=2) as two:
        warm(one)
        one.save_adapter(saved)
        two.load_adapter(saved)
        assert np.array_equal(one.get("weights"), two.get("weights"))
    assert os.listdir(tmp_path) == ["a.gguf"]


# ---- what goes wrong


def test_adapters_that_do_not_fit_are_refused(tiny: Any, tmp_path: Path) -> None:
    saved = tmp_path / "a.gguf"
    with _engine.Trainer(tiny("llama"), rank=4, alpha=8.0) as trainer:
        trainer.save_adapter(saved)
    data = saved.read_bytes()
    cases = {
        "rank": ("llama", {"rank": 2, "alpha": 8.0}, "shape"),
        "alpha": ("llama", {"rank": 4, "alpha": 4.0}, "alpha"),
        "targets": ("llama", {"rank": 4, "alpha": 8.0, "targets": ("attn_q",)}, "tensors"),
        "architecture": ("qwen2", {"rank": 4, "alpha": 8.0}, "architecture"),
    }
    for arch, options, says in cases.values():
        with _engine.Trainer(tiny(arch), **options) as trainer:
            before = trainer.get("weights")
            with pytest.raises(AdapterError, match=says):
                trainer.load_adapter(saved)
            assert np.array_equal(trainer.get("weights"), before)
    with _engine.Trainer(tiny("llama"), rank=4, alpha=8.0) as trainer:
        for damaged in (data[:100], data[: len(data) // 2], data[:-1], b"", b"GGUF", b"no" * 9):
            saved.write_bytes(damaged)
            with pytest.raises(AdapterError):
                trainer.load_adapter(saved)
        with pytest.raises(AdapterError):
            trainer.load_adapter(tiny("llama"))
        with pytest.raises(ModelNotFoundError):
            trainer.load_adapter(tmp_path / "absent.gguf")


@pytest.mark.parametrize("arch", ["mamba", "mamba2", "jamba"])
def test_other_architectures_are_refused_by_name(tiny: Any, arch: str) -> None:
    with pytest.raises(UnsupportedError, match=arch):
        _engine.Trainer(tiny(arch))


def test_experts_get_no_adapters(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"target 'ffn_up_exps'.*attn_output"):
        _engine.Trainer(tiny("qwen3moe"), targets=("ffn_up_exps",))
    with _engine.Trainer(tiny("qwen3moe"), rank=2) as trainer:
        assert trainer.targets == ("attn_q", "attn_k", "attn_v", "attn_output")
    with _engine.Trainer(tiny("qwen2moe"), rank=2) as trainer:
        assert trainer.targets[4:] == ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


def test_layers_without_an_adapter(tiny: Any) -> None:
    """As the first one of a hybrid model may be: nothing is learned below the first adapter."""
    tokens, labels = example(30)
    with _engine.Trainer(tiny("lfm2", n_layer=5), rank=4, targets=("attn_output",)) as trainer:
        assert [name for name, *_ in trainer.layout] == [
            "blk.1.attn_output.weight", "blk.3.attn_output.weight"
        ]  # fmt: skip
        losses = []
        for _ in range(6):
            losses.append(trainer.forward_backward(tokens, labels).loss)
            trainer.adamw_step(1e-2)
        assert losses[-1] < losses[0] - 0.1


def test_the_table_of_architectures_is_what_the_tests_cover() -> None:
    table = _engine.training_architectures()
    assert sorted(table) == sorted(ARCHITECTURES)
    docs = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    for name, notes in table.items():
        assert f"| `{name}` | {notes} |" in docs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 65}, "rank 65 exceeds"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": "attn_q"}, "targets"),
        ({"targets": ()}, "targets"),
        ({"targets": ("attn_x",)}, "attn_x"),
        ({"targets": ("attn_q", "attn_q")}, "twice"),
        ({"targets": ("attn_norm",)}, "attn_norm"),
        ({"precision": "nf4"}, "precision"),
        ({"threads": 0}, "threads"),
        ({"kernel": "blas"}, "kernel"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_are_checked(tiny: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        _engine.Trainer(tiny("llama"), **options)


def test_rows_are_checked(trainer: Any) -> None:
    tokens, labels = example(10)
    bad: list[tuple[Any, Any, dict[str, Any]]] = [
        ([], [], {}),
        (tokens, labels[:-1], {}),
        (tokens, np.full(10, -1), {}),
        (tokens, labels + 100000, {}),
        (np.where(np.arange(10) == 3, 10**6, tokens), labels, {}),
        (np.where(np.arange(10) == 3, -1, tokens), labels, {}),
        (tokens.astype(float), labels, {}),
        (tokens.reshape(2, 5), labels, {}),
        (tokens, labels, {"positions": np.arange(9)}),
        (tokens, labels, {"positions": [[0], [1, 2]]}),
        (tokens, labels, {"weights": [[0.5], [1.0, 2.0]]}),
        (tokens, labels, {"positions": np.arange(10) - 1}),
        (tokens, labels, {"segments": np.zeros(11, int)}),
        (tokens, labels, {"weights": np.full(10, np.nan)}),
        (tokens.astype(np.int64) + 2**40, labels, {}),
    ]
    for t, y, options in bad:
        with pytest.raises(ParameterError):
            trainer.forward_backward(t, y, **options)
        with pytest.raises(ParameterError):
            trainer.evaluate(t, y, **options)
    assert not trainer.get("gradients").any()
    with pytest.raises(ParameterError):
        trainer.get("biases")
    with pytest.raises(ParameterError):
        trainer.set("weights", np.zeros(3))
    with pytest.raises(ParameterError):
        trainer.adamw_step(-1.0)


def test_longrope_rows_end_at_the_original_context(tiny: Any) -> None:
    path = tiny("phi3", rope_scaling="longrope", rope_original_ctx=64)
    with _engine.Trainer(path, rank=2) as trainer:
        trainer.evaluate(*example(64))
        with pytest.raises(UnsupportedError, match="64"):
            trainer.evaluate(*example(65))


def test_files_that_are_no_model_are_refused(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        _engine.Trainer(tmp_path / "absent.gguf")
    data = tiny("llama").read_bytes()
    for i, damaged in enumerate((b"", b"GGUF", b"x" * 100, data[:1000], data[: len(data) // 2])):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(damaged)
        with pytest.raises((ModelFormatError, UnsupportedError)):
            _engine.Trainer(path)


def test_an_adapter_that_cannot_be_written_leaves_no_trace(trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        trainer.save_adapter(tmp_path / "no" / "such.gguf")
    with pytest.raises(TriollamaError):
        trainer.save_adapter(tmp_path / "a.gguf", {"": "x"})
    with pytest.raises(OSError):
        trainer.save_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- stopping


def test_an_abort_clears_the_gradients_and_leaves_the_run_as_it_was(trainer: Any) -> None:
    tokens, labels = example(40)
    expected = gradients(trainer, (tokens, labels))
    weights, counter = trainer.get("weights"), trainer.dropout_counter
    trainer.request_abort()
    for call in (trainer.forward_backward, trainer.evaluate):
        with pytest.raises(DecodeAborted):
            call(tokens, labels)
    assert not trainer.get("gradients").any()
    assert trainer.dropout_counter == counter
    trainer.set("gradients", expected)
    trainer.adamw_step(0.0)  # a step is never cut in half
    trainer.request_abort(False)
    assert np.array_equal(trainer.get("weights"), weights)
    assert np.array_equal(gradients(trainer, (tokens, labels)), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers need memory")
@pytest.mark.parametrize(
    ("arch", "kept_bytes"), [("llama", 0), ("llama", 1 << 27), ("qwen3moe", 1 << 27)]
)
def test_gradients_are_cleared_where_memory_runs_out(
    tiny: Any, tmp_path: Path, run_isolated: Any, arch: str, kept_bytes: int
) -> None:
    """At every amount of memory with which a row fails, on the way back too. Then training goes on,
    or says that it cannot."""
    code = """
        import resource, sys
        import numpy as np
        from triollama import _engine
        from triollama.errors import EngineError, OutOfMemoryError

        path, saved, kept_bytes = sys.argv[1:]
        n = 200
        tokens = np.arange(5, 5 + n, dtype=np.int32)
        labels = np.append(tokens[1:], -1).astype(np.int32)

        def made():
            trainer = _engine.Trainer(path, rank=4, threads=1, kept_bytes=int(kept_bytes))
            noise = np.random.default_rng(1).normal(0.0, 0.02, trainer.n_parameters)
            trainer.set("weights", trainer.get("weights") + noise.astype(np.float32))
            if warmed:  # the way forward has its memory
                trainer.evaluate(tokens, labels)
            return trainer

        def fits(call, extra):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
            try:
                call(tokens, labels)
                return True
            except OutOfMemoryError:
                return False
            except EngineError as error:
                assert "saved and closed" in str(error), error
                return False
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)

        def goes_on():
            try:
                trainer.forward_backward(tokens, labels)
                assert np.array_equal(trainer.get("gradients"), expected)
            except EngineError as error:
                assert "saved and closed" in str(error), error

        warmed = False
        with made() as trainer:
            trainer.forward_backward(tokens, labels)
            expected = trainer.get("gradients")
        for warmed in (False, True):
            on_the_way_back = 0
            trainer = made()
            ones = np.ones(trainer.n_parameters, np.float32)
            for extra in range(0, 2**25, 2**15):
                there = fits(trainer.evaluate, extra)
                trainer.set("gradients", ones)
                if fits(trainer.forward_backward, extra):
                    break
                on_the_way_back += there
                assert not trainer.get("gradients").any(), extra
                if extra % 2**17 == 0:
                    goes_on()
                    trainer.save_adapter(saved)
                    trainer.close()
                    trainer = made()
            found = trainer.get("gradients") - ones
            trainer.clear_gradients()
            trainer.forward_backward(tokens, labels)
            assert np.allclose(found, trainer.get("gradients"), atol=1e-5)
            trainer.close()
        print(on_the_way_back)
    """
    # What was freed is given back, so that it does not serve the next attempt.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = run_isolated(code, tiny(arch), tmp_path / "saved.gguf", kept_bytes, **given_back)
    assert int(done.stdout) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers need memory")
def test_threads_have_their_memory_before_they_compute(tiny: Any, run_isolated: Any) -> None:
    """An exception in one of several would end the process."""
    code = """
        import resource, sys
        import numpy as np
        from triollama import _engine
        from triollama.errors import OutOfMemoryError

        tokens = np.arange(5, 17, dtype=np.int32)
        failed = 0
        with _engine.Trainer(sys.argv[1], rank=2, threads=2, kept_bytes=0) as trainer:
            trainer.evaluate(tokens, tokens)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            for extra in range(0, 2**26, 2**20):
                resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
                try:
                    trainer.forward_backward(tokens, tokens)
                    break
                except OutOfMemoryError:
                    failed += 1
        print(failed)
    """
    given_back = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}
    model = tiny("llama", n_ff=16384, n_layer=1, dtype="Q8_0")
    assert 5 <= int(run_isolated(code, model, **given_back).stdout) < 64


def test_an_abort_reaches_a_call_in_another_thread(tiny: Any) -> None:
    with _engine.Trainer(tiny("gemma3", n_vocab=20000), rank=4, threads=1) as trainer:
        tokens, labels = example(400)
        entered, ended = threading.Event(), []

        def work() -> None:
            entered.set()
            try:
                while True:
                    trainer.forward_backward(tokens, labels)
            except DecodeAborted:
                ended.append("aborted")

        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        trainer.request_abort()
        thread.join(60)
        assert ended == ["aborted"]
        assert not trainer.get("gradients").any()


def test_two_threads_at_once_and_use_after_close(tiny: Any) -> None:
    trainer = _engine.Trainer(tiny("gemma3", n_vocab=20000), rank=4, threads=1)
    tokens, labels = example(400)
    stop, errors = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                trainer.evaluate(tokens, labels)
            except BusyError as error:
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors
    trainer.close()
    trainer.close()
    assert trainer.is_closed
    for call in (lambda: trainer.get("weights"), lambda: trainer.step, trainer.request_abort):
        with pytest.raises(ClosedError):
            call()


def test_memory_of_the_head_is_flat_in_the_vocabulary(tiny: Any) -> None:
    arenas = []
    for n_vocab in (4096, 65536):
        with _engine.Trainer(tiny("gemma3", n_vocab=n_vocab), rank=2) as trainer:
            tokens, labels = example(100)
            trainer.forward_backward(tokens, labels)
            arenas.append(trainer.memory["arena"])
    assert arenas[1] <= arenas[0] * 1.1


@pytest.mark.slow
def test_a_damaged_model_file_never_ends_the_process(tiny: Any, run_isolated: Any) -> None:
    """One byte changed in the metadata at 150 places: an error, or a model that still trains."""
    run_isolated(
        """
        import random, sys
        from pathlib import Path
        import numpy as np
        from triollama import _engine
        from triollama.errors import TriollamaError

        source, target = Path(sys.argv[1]).read_bytes(), Path(__file__).with_name("damaged.gguf")
        end = source.index(b"blk.1.ffn_up.weight") + 100
        places = random.Random(0)
        outcomes = {"refused": 0, "trained": 0}
        for _ in range(150):
            data = bytearray(source)
            data[places.randrange(end)] ^= 1 << places.randrange(8)
            target.write_bytes(data)
            try:
                with _engine.Trainer(target, rank=2, threads=1) as trainer:
                    tokens = np.arange(10) % min(trainer.n_vocab, 400)
                    trainer.forward_backward(tokens, tokens)
                    trainer.adamw_step(1e-3)
                outcomes["trained"] += 1
            except TriollamaError:
                outcomes["refused"] += 1
        target.unlink()
        assert outcomes["refused"] >= 5 and outcomes["trained"] >= 5, outcomes
        """,
        tiny("llama"),
    )

"""Memory: removing, sharing, shifting; and saved states that load only where they belong."""

from __future__ import annotations

import itertools
import struct
import zlib

import numpy as np
import pytest
from triollama._engine import (
    Batch,
    Context,
    Model,
    load_context,
    load_sequence,
    save_context,
    save_sequence,
)
from triollama.errors import NoSlotError, ParameterError, StateError, UnsupportedError

# The cache holds keys and values as float16, and batches of other shapes add up in other orders.
ROUNDING = 5e-3

TOKENS = list(range(40, 60))


def decode(context, tokens, pos=0, seq_id=0):
    batch = Batch(len(tokens))
    batch.extend(tokens, pos, seq_id)
    context.decode(batch)
    return context.logits(copy=True)


@pytest.fixture
def model(tiny):
    with Model(tiny("llama")) as model:
        yield model


def make(model, **options):
    return Context(model, **{"n_ctx": 128, "n_seq_max": 3, "n_threads": 1, **options})


def test_remove_and_redo(model):
    with make(model) as context:
        reference = decode(context, TOKENS)
        memory = context.memory
        assert (memory.seq_pos_min(0), memory.seq_pos_max(0)) == (0, 19)
        assert memory.seq_rm(0, 10)
        assert memory.seq_pos_max(0) == 9
        np.testing.assert_allclose(decode(context, TOKENS[10:], 10), reference, atol=ROUNDING)
        assert memory.seq_rm(-1)
        assert memory.seq_pos_max(0) == -1


def test_copy_shares_and_diverges(model):
    with make(model) as context:
        decode(context, TOKENS)
        context.memory.seq_cp(0, 1, 0, 10)
        assert context.memory.seq_pos_max(1) == 9
        a = decode(context, [90], 10, seq_id=1)
        b = decode(context, [91], 20, seq_id=0)
    with make(model) as context:
        np.testing.assert_allclose(decode(context, [*TOKENS[:10], 90]), a, atol=ROUNDING)
        context.memory.clear()
        np.testing.assert_allclose(decode(context, [*TOKENS, 91]), b, atol=ROUNDING)


def test_copy_between_separate_caches_is_whole(model):
    with make(model, kv_unified=False) as context:
        decode(context, TOKENS)
        for part in ((0, 5), (5, None), (5, 9)):
            with pytest.raises(UnsupportedError, match="whole"):
                context.memory.seq_cp(0, 1, *part)
        context.memory.seq_cp(0, 1)
        a = decode(context, [90], 20, seq_id=1)
        context.memory.seq_keep(1)
        assert context.memory.seq_pos_max(0) == -1
    with make(model) as context:
        np.testing.assert_allclose(decode(context, [*TOKENS, 90]), a, atol=ROUNDING)


def test_shift(model):
    with make(model) as context:
        assert context.memory.can_shift
        decode(context, TOKENS)
        context.memory.seq_rm(0, 4, 8)
        context.memory.seq_add(0, 8, None, -4)
        assert context.memory.seq_pos_max(0) == 15
        assert np.isfinite(decode(context, [90], 16)).all()


def test_recurrent_memory(tiny):
    with Model(tiny("mamba")) as model, make(model) as context:
        decode(context, TOKENS)
        memory = context.memory
        assert memory.can_continue_at(0, 20) and not memory.can_continue_at(0, 10)
        assert not memory.seq_rm(0, 10)
        assert memory.seq_rm(0)
        assert memory.seq_pos_max(0) == -1


@pytest.mark.parametrize("bad", [-2, 3, 100, 2**40, 1.5])
def test_bad_sequences(model, bad):
    with make(model) as context:
        memory = context.memory
        for use in (
            lambda: memory.seq_rm(bad),
            lambda: memory.seq_pos_min(bad),
            lambda: memory.seq_pos_max(bad),
            lambda: memory.seq_cp(bad, 0),
            lambda: memory.seq_cp(0, bad),
            lambda: memory.seq_keep(bad),
            lambda: memory.seq_add(bad, 0, None, 1),
            lambda: memory.can_continue_at(bad, 0),
            lambda: save_sequence(context, bad),
            lambda: load_sequence(context, b"", bad),
        ):
            with pytest.raises(ParameterError):
                use()
        # The context is not left busy by a refused call.
        decode(context, TOKENS)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "jamba"])
def test_sequence_state(tiny, arch):
    with Model(tiny(arch)) as model, make(model) as source, make(model, n_ctx=256) as target:
        decode(source, TOKENS)
        blob = save_sequence(source, 0)
        decode(target, TOKENS[::-1], seq_id=2)
        load_sequence(target, blob, 2)
        assert target.memory.seq_pos_max(2) == 19
        np.testing.assert_allclose(
            decode(source, [60], 20), decode(target, [60], 20, seq_id=2), atol=1e-5
        )


def test_context_state(model):
    with make(model) as source, make(model) as target:
        decode(source, TOKENS, seq_id=0)
        decode(source, TOKENS[::-1], seq_id=1)
        load_context(target, save_context(source))
        for s in (0, 1):
            np.testing.assert_allclose(
                decode(source, [60], 20, s), decode(target, [60], 20, s), atol=1e-5
            )


def test_foreign_states(tiny, model):
    with make(model) as context:
        decode(context, TOKENS)
        blob = save_sequence(context, 0)
        whole = save_context(context)
        with pytest.raises(StateError, match="whole context"):
            load_sequence(context, whole, 0)
        with pytest.raises(StateError, match="one sequence"):
            load_context(context, blob)
        for options in ({"kv_unified": False}, {"flash_attn": "off"}, {"type_k": "q8_0"}):
            with make(model, **options) as other, pytest.raises(StateError, match="another"):
                load_sequence(other, blob, 0)
        with (
            Model(tiny("llama", seed=3)) as stranger,
            make(stranger) as other,
            pytest.raises(StateError, match="another model"),
        ):
            load_sequence(other, blob, 0)
        with make(model, n_ctx=256, n_seq_max=1) as other:
            load_sequence(other, blob, 0)


def test_damaged_states_change_nothing(model):
    with make(model) as context:
        decode(context, TOKENS)
        blob = save_sequence(context, 0)
        reference = decode(context, [60], 20)
        random = np.random.default_rng(0)
        damaged = [blob[: len(blob) * i // 16] for i in range(16)]
        damaged += [blob + b"\0", b"", random.bytes(200), random.bytes(len(blob))]
        for _ in range(100):
            flipped = bytearray(blob)
            bit = int(random.integers(len(blob) * 8))
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(flipped))
        for bad in damaged:
            with pytest.raises(StateError):
                load_sequence(context, bad, 0)
        assert context.memory.seq_pos_max(0) == 20
        context.memory.seq_rm(0, 20)
        np.testing.assert_allclose(decode(context, [60], 20), reference, atol=1e-5)
        for bad in (None, "text", 5, [1, 2]):
            with pytest.raises(ParameterError):
                load_sequence(context, bad, 0)


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_what_it_says_and_older_files_are_read(model):
    assert crc32c(b"123456789") == 0xE3069283
    with make(model, n_ctx=256) as context:
        for n in (1, 2, 5):
            decode(context, TOKENS[:n])
            blob = save_sequence(context, 0)
            payload = blob[56:]
            quarter = len(payload) // 4 // 8 * 8
            cuts = [0, quarter, 2 * quarter, 3 * quarter, len(payload)]
            sums = b"".join(
                crc32c(payload[a:b]).to_bytes(4, "little") for a, b in itertools.pairwise(cuts)
            )
            assert struct.unpack_from("<I", blob, 4) == (2,)
            assert struct.unpack_from("<I", blob, 52) == (crc32c(sums),)
            # Version 1 had a CRC-32.
            old = bytearray(blob)
            struct.pack_into("<I", old, 4, 1)
            with pytest.raises(StateError, match="checksum"):
                load_sequence(context, old, 1)
            struct.pack_into("<I", old, 52, zlib.crc32(payload))
            load_sequence(context, old, 1)
            assert context.memory.seq_pos_max(1) == n - 1
            struct.pack_into("<I", old, 4, 3)
            with pytest.raises(StateError, match="version 3"):
                load_sequence(context, old, 1)
            context.memory.seq_rm(0)


def test_a_checksum_is_no_proof_against_forgery_but_lengths_are_checked(model):
    with make(model) as context:
        decode(context, TOKENS)
        blob = bytearray(save_sequence(context, 0))
        struct.pack_into("<Q", blob, 44, 2**60)
        with pytest.raises(StateError, match="it says"):
            load_sequence(context, blob, 0)


def test_no_room_for_a_state(model):
    with (
        make(model, n_ctx=256) as source,
        make(model, n_ctx=128, n_seq_max=2, n_ctx_total=256) as target,
    ):
        decode(source, [40] * 200)
        blob = save_sequence(source, 0)
        decode(target, [41] * 100, seq_id=1)
        with pytest.raises(NoSlotError, match="too few free cells"):
            load_sequence(target, blob, 0)
        assert target.memory.seq_pos_max(0) == -1
        assert target.memory.seq_pos_max(1) == 99

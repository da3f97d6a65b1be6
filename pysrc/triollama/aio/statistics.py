"""What an engine has done and is doing."""

from __future__ import annotations

import msgspec

__all__ = ["Statistics"]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts as of the engine's last step; totals are since it was opened.

    ``running``: streams that generate; ``prefilling``: whose prompt is being read; ``parked``: of
    those, the ones that wait for their reader; ``queued``: that wait for a place.
    ``sequences``: kept between streams; ``slots_free``: places for more; ``cells_used``: positions
    of the KV cache in use, ``host_bytes``: bytes of host memory that hold evicted ones.
    ``finished``, ``cancelled``, ``failed``: streams that ended so. ``prompt_tokens`` and
    ``generated_tokens`` were computed, ``cached_tokens`` taken from memory instead.
    ``steps``: decodes; ``aborts``: decodes stopped by a cancellation; ``evictions`` and
    ``restores``: of sequences; ``preemptions``: streams that had to give up their place for a
    while; ``set_changes``: of adapters; ``slow_samples``: tokens chosen beside the steps.
    ``first_token_s``: seconds from submission to the first token, of the last 256 streams.
    """

    running: int
    prefilling: int
    parked: int
    queued: int
    sequences: int
    slots_free: int
    cells_used: int
    host_bytes: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    aborts: int
    evictions: int
    restores: int
    preemptions: int
    set_changes: int
    slow_samples: int
    first_token_s: list[float]

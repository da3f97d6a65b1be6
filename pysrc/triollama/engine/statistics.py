"""What an engine has done and is doing."""

from __future__ import annotations

import msgspec

__all__ = ["Statistics"]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts as of the engine's last step; totals are since it was opened.

    ``running``: streams that generate; ``prefilling``: whose prompt is being read; ``parked``: of
    those, the ones that wait for their reader; ``queued``: that wait for a place.
    ``sequences``: kept between streams; ``slots_free``: places for more; ``cells_used``: positions
    of the KV cache in use, those that forks share counted once; ``host_bytes``, ``disk_bytes``:
    bytes of host memory, and of disk, that hold evicted ones.
    ``finished``, ``cancelled``, ``failed``: streams that ended so. ``prompt_tokens`` and
    ``generated_tokens`` were computed, ``cached_tokens`` taken from memory instead.
    ``steps``: decodes; ``aborts``: decodes stopped by a cancellation; ``evictions``: of sequences,
    ``spills``: of those from host memory to disk; ``restores``: that came back from either,
    ``recomputes``: that were sooner computed again; ``disk_failures``: writes and reads that
    failed; ``preemptions``: streams that had to give up their place; ``set_changes``: of adapters;
    ``slow_samples``: tokens chosen beside the steps.
    ``first_token_s``: seconds from submission to the first token, of the last 256 streams.
    """

    running: int
    prefilling: int
    parked: int
    queued: int
    sequences: int
    slots_free: int
    cells_used: int
    host_bytes: int = 0
    disk_bytes: int = 0
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    aborts: int = 0
    evictions: int = 0
    restores: int = 0
    recomputes: int = 0
    spills: int = 0
    disk_failures: int = 0
    preemptions: int = 0
    set_changes: int = 0
    slow_samples: int = 0
    first_token_s: list[float]

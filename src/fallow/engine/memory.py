"""How much memory there is for the KV cache, within what the machine and the process's cgroup allow."""

from __future__ import annotations

from pathlib import Path

from fallow.errors import FallowError
from fallow.models.config import ModelConfig

_LANES = 16  # heads are padded to whole vectors
_ELEMENT_BYTES = 2  # bfloat16
_FULL_CONTEXTS = 4
_TOKENS_PER_SEQUENCE = 512
_SHARE = 0.3  # of the memory at hand: the weights, other processes and page caches need theirs
_LEAST_PAGES = 8
_CGROUPS = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")


def page_bytes(config: ModelConfig, page_size: int, *, summaries: bool = False) -> int:
    """Bytes of the keys and values of ``page_size`` tokens in all layers, and of the ``summaries`` of the keys (two
    numbers a dimension) where a plan chooses pages by them."""
    padded_dim = -(-config.head_dim // _LANES) * _LANES
    columns = config.num_hidden_layers * config.num_key_value_heads * padded_dim
    return 2 * _ELEMENT_BYTES * columns * (page_size + (1 if summaries else 0))


def kv_cache_pages(
    config: ModelConfig,
    *,
    page_size: int,
    context: int,
    max_sequences: int,
    kv_cache_bytes: int | None,
    summaries: bool = False,
) -> int:
    """Pages of a cache of ``kv_cache_bytes``; by default enough for a few full contexts or many short sequences, but
    no more than a share of the memory at hand. Raises ``FallowError`` where not even one page fits."""
    size = page_bytes(config, page_size, summaries=summaries)
    if kv_cache_bytes is not None:
        if kv_cache_bytes < size:
            raise FallowError(
                f"kv_cache_bytes is {kv_cache_bytes}, but {page_size} tokens of this model take {size}: give more."
            )
        return min(kv_cache_bytes // size, 2**31 - 1)
    wanted = max(_FULL_CONTEXTS * context, _TOKENS_PER_SEQUENCE * max_sequences)
    pages = -(-wanted // page_size)
    available = available_bytes()
    if available is not None:
        pages = min(pages, int(_SHARE * available) // size)
    return max(pages, _LEAST_PAGES)


def available_bytes() -> int | None:
    """Memory that this process may still take, the least of the machine's and its cgroups'; None where nothing says."""
    limits = [limit for limit in (_machine(), *_cgroups()) if limit is not None]
    return min(limits, default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _cgroups() -> list[int]:
    """What is left below each memory limit on the way to the root, cgroup v2 or v1."""
    try:
        entries = [line.split(":", 2) for line in _PROC_CGROUP.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path can be the host's: what is mounted as the root is then the process's own.
        for place in (folder, *(p for p in folder.parents if p == root or root in p.parents)):
            limit = _left_below(place, *names)
            if limit is not None:
                left.append(limit)
    return left


def _left_below(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(most - used + int(statistics.get(reclaimable, 0)), 0)
    except (OSError, ValueError):  # no such controller, or no limit ("max")
        return None

"""KV pages: who holds them, which prefix of tokens each full one stands for, and which may be taken again.

A page is free, held by sequences (reference counted), or cached: full, in the prefix index and held by nobody. Cached
pages are taken again least recently used first, so the cache costs no sequence a page (automatic prefix caching as in
vLLM, PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence


class PageManager:
    """``num_pages`` pages of ``page_size`` tokens. Not safe under several threads, but for ``chain``.

    Without ``keep_unused`` no page is cached: what nobody holds is free, and the next one is the page used last.

    A full page is named by a digest of all tokens up to its end: BLAKE2b, keyed with a secret of this manager, of the
    digest of the page before it and its own tokens. Two prefixes with one digest cannot be constructed.
    """

    def __init__(self, num_pages: int, page_size: int, *, keep_unused: bool = True) -> None:
        self.num_pages = num_pages
        self.keep_unused = keep_unused
        self.page_size = page_size
        self._key = os.urandom(32)
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._index: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: dict[int, None] = {}  # least recently used first

    @property
    def available_pages(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def used_pages(self) -> int:
        """Pages that a sequence holds."""
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def cached_pages(self) -> int:
        return len(self._cached)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def chain(self, digests: list[bytes], tokens: array[int], salt: bytes = b"") -> None:
        """Extend ``digests`` to all full pages of ``tokens``; prefixes with different salts are never shared."""
        from hashlib import blake2b  # noqa: PLC0415  OpenSSL takes 3 MB, and not every process shares prefixes

        size = self.page_size
        for start in range(len(digests) * size, len(tokens) - size + 1, size):
            previous = digests[-1] if digests else salt
            page = tokens[start : start + size].tobytes()
            digests.append(blake2b(previous + page, digest_size=32, key=self._key).digest())

    def lookup(self, digests: Sequence[bytes], limit: int) -> list[int]:
        """The pages that hold the longest prefix there is of the first ``limit`` pages; nothing is taken."""
        pages = []
        for digest in digests[:limit]:
            page = self._index.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def can_take(self, shared: Sequence[int], new: int) -> bool:
        """Whether ``shared`` pages of the index and ``new`` others could be had together."""
        revived = sum(not self._references[page] for page in shared)
        return self.available_pages - revived >= new

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages of the index once more."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def allocate(self) -> int:
        """A page of one's own; there must be an available one."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._cached))
            del self._cached[page]
            self._forget(page)
        self._references[page] = 1
        return page

    def register(self, page: int, digest: bytes) -> None:
        """Put a full page into the index, unless another page stands for the same prefix already."""
        if self._digests[page] is None and digest not in self._index:
            self._digests[page] = digest
            self._index[digest] = page

    def release(self, pages: Sequence[int]) -> None:
        """Give pages of one sequence back. The end of a prefix is useless without its beginning: it goes first."""
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                if not self.keep_unused:
                    self._forget(page)
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        if digest is not None:
            del self._index[digest]
            self._digests[page] = None

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert every invariant; ``holders`` are the page lists of all sequences."""
        held = Counter(page for pages in holders for page in pages)
        assert {page: count for page, count in enumerate(self._references) if count} == dict(held)
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached
        assert free | cached == {page for page, count in enumerate(self._references) if not count}
        assert all(self._digests[page] is None for page in free)
        assert all(self._digests[page] is not None for page in cached)
        named = {digest: page for page, digest in enumerate(self._digests) if digest is not None}
        assert named == self._index
        assert len(named) == sum(digest is not None for digest in self._digests), "two pages have one digest"

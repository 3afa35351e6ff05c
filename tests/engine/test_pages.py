"""Pages: counted, shared by content, taken again oldest first, never lost."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.engine.pages import PageManager

SIZE = 4


def digests_of(pages: PageManager, tokens: list[int], salt: bytes = b"") -> list[bytes]:
    digests: list[bytes] = []
    pages.chain(digests, array("i", tokens), salt)
    return digests


def test_a_prefix_is_found_page_by_page() -> None:
    pages = PageManager(8, SIZE)
    digests = digests_of(pages, list(range(11)))
    assert len(digests) == 2
    held = [pages.allocate(), pages.allocate(), pages.allocate()]
    for page, digest in zip(held, digests, strict=False):
        pages.register(page, digest)
    assert pages.lookup(digests, 9) == held[:2]
    assert pages.lookup(digests, 1) == held[:1]
    assert pages.lookup(digests_of(pages, [0, 1, 2, 3, 9, 9, 9, 9]), 9) == held[:1]
    # The same tokens behind another beginning, or with a salt, are other pages.
    assert pages.lookup(digests_of(pages, [4, 5, 6, 7]), 9) == []
    assert pages.lookup(digests_of(pages, list(range(8)), b"salt"), 9) == []
    pages.check([held])


def test_digests_differ_between_managers() -> None:
    assert digests_of(PageManager(1, SIZE), [1, 2, 3, 4]) != digests_of(PageManager(1, SIZE), [1, 2, 3, 4])


def test_cached_pages_go_oldest_first_and_ends_before_beginnings() -> None:
    pages = PageManager(4, SIZE)
    for first in (0, 100):
        digests = digests_of(pages, list(range(first, first + 8)))
        held = [pages.allocate(), pages.allocate()]
        for page, digest in zip(held, digests, strict=True):
            pages.register(page, digest)
        pages.release(held)
    assert pages.used_pages == 0
    assert pages.cached_pages == 4
    pages.allocate()
    assert len(pages.lookup(digests_of(pages, list(range(8))), 2)) == 1
    pages.allocate()
    assert len(pages.lookup(digests_of(pages, list(range(8))), 2)) == 0
    assert len(pages.lookup(digests_of(pages, list(range(100, 108))), 2)) == 2


def test_two_pages_with_one_content_are_not_both_indexed() -> None:
    pages = PageManager(3, SIZE)
    (digest,) = digests_of(pages, [1, 2, 3, 4])
    first, second = pages.allocate(), pages.allocate()
    pages.register(first, digest)
    pages.register(second, digest)
    assert pages.lookup([digest], 1) == [first]
    pages.release([second])
    assert pages.cached_pages == 0
    pages.check([[first]])


def test_revived_pages_are_not_counted_twice() -> None:
    pages = PageManager(3, SIZE)
    digests = digests_of(pages, list(range(8)))
    held = [pages.allocate(), pages.allocate()]
    for page, digest in zip(held, digests, strict=True):
        pages.register(page, digest)
    pages.release(held)
    assert pages.available_pages == 3
    assert pages.can_take(held, 1)
    assert not pages.can_take(held, 2)
    pages.share(held)
    pages.check([held])


def test_without_a_cache_the_page_used_last_comes_first() -> None:
    pages = PageManager(4, SIZE, keep_unused=False)
    (digest,) = digests_of(pages, [1, 2, 3, 4])
    held = [pages.allocate(), pages.allocate()]
    pages.register(held[0], digest)
    assert pages.lookup([digest], 1) == held[:1]  # what is held is shared all the same
    pages.release(held)
    assert pages.cached_pages == 0
    assert pages.lookup([digest], 1) == []
    assert pages.allocate() == held[0]
    pages.check([held[:1]])


def test_check_finds_a_lost_page() -> None:
    pages = PageManager(2, SIZE)
    pages.allocate()
    with pytest.raises(AssertionError):
        pages.check([])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 20)), max_size=60))
def test_any_order_of_use_keeps_the_invariants(actions: list[tuple[int, int, int]]) -> None:
    pages = PageManager(12, SIZE)
    holders: list[list[int]] = []
    for action, family, length in actions:
        if action < 2:  # a sequence with a prompt of one of a few families comes
            tokens = [family] * length
            digests = digests_of(pages, tokens)
            shared = pages.lookup(digests, (length - 1) // SIZE)
            new = pages.pages_for(length) - len(shared)
            if pages.can_take(shared, new):
                pages.share(shared)
                held = shared + [pages.allocate() for _ in range(new)]
                for page, digest in zip(held, digests, strict=False):
                    pages.register(page, digest)
                holders.append(held)
        elif holders:
            pages.release(holders.pop(family % len(holders)))
        pages.check(holders)
    for held in holders:
        pages.release(held)
    pages.check([])
    assert pages.used_pages == 0

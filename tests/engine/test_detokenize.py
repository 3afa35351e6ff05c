from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.engine.detokenize import Detokenizer


def cut(text: str, stop: tuple[str, ...], include_stop: bool) -> tuple[str, str | None]:
    """What the whole text gives, found character by character."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if s and text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def run(pieces: list[bytes], stop: tuple[str, ...] = (), include_stop: bool = False) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(pieces, stop, include_stop)
    shown = []
    for i in range(len(pieces)):
        text, stopped = detokenizer.feed(i)
        shown.append(text)
        if stopped is not None:
            break
    shown.append(detokenizer.finish())
    return shown, detokenizer.stopped


def chunks(data: bytes, rng: random.Random) -> list[bytes]:
    pieces = []
    while data:
        size = rng.randint(0, 5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.text(alphabet="ab\n<|é🙂", max_size=60).map(str.encode)),
    st.lists(st.text(alphabet="ab\n<|é🙂\ufffd", max_size=6), max_size=4).map(tuple),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_chunking_gives_the_text_of_the_whole(
    data: bytes, stop: tuple[str, ...], include_stop: bool, rng: random.Random
) -> None:
    shown, stopped = run(chunks(data, rng), stop, include_stop)
    assert ("".join(shown), stopped) == cut(data.decode(errors="replace"), stop, include_stop)


def test_characters_come_whole() -> None:
    shown, _ = run([bytes([byte]) for byte in "aé🙂".encode()])
    assert shown == ["a", "", "é", "", "", "", "🙂", ""]


def test_a_character_that_is_cut_off_is_marked() -> None:
    assert run(["🙂".encode()[:2]])[0] == ["", "\ufffd"]
    assert run([b"\xff", b"a"])[0] == ["\ufffd", "a", ""]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer([b"hi <|", b"en", b"d", b"|>x", b"ing"], ("<|end|>",))
    assert detokenizer.feed(0) == ("hi ", None)
    assert detokenizer.feed(1) == ("", None)
    assert detokenizer.feed(4) == ("<|ening", None)
    assert detokenizer.feed(0) == ("hi ", None)
    assert detokenizer.feed(1) == ("", None)
    assert detokenizer.feed(2) == ("", None)
    assert detokenizer.feed(3) == ("", "<|end|>")
    assert detokenizer.feed(4) == ("", "<|end|>")
    assert detokenizer.finish() == ""


def test_the_stop_string_is_shown_when_asked() -> None:
    assert run([b"a", b"##b"], ("#",), include_stop=True) == (["a", "#", ""], "#")


def test_ids_beyond_the_vocabulary_add_nothing() -> None:
    detokenizer = Detokenizer([b"a"])
    assert detokenizer.feed(7) == ("", None)
    assert detokenizer.feed(0) == ("a", None)

"""What a tokenizer.json says, checked before the tokenizers library sees it, and the bytes of each of its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import Any

from fallow.errors import ModelFileError
from fallow.models.gguf_tokenizer import MAX_TOKEN_BYTES, MAX_VOCAB

_MAX_MERGES = 4 * MAX_VOCAB
_MAX_STEPS = 64  # of a normalizer, pre-tokenizer, decoder or post-processor
_MAX_AFFIX = 64  # characters of what BPE adds to every piece
_MAX_GROWTH = 1024  # how many times longer a normalizer may make a text
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def check_document(document: dict[str, Any]) -> None:
    """Raise ``ModelFileError`` unless the vocabulary, the added tokens and the steps are of sane kinds and sizes.

    The parts that the tokenizers library checks itself are left to it. Dropout, which would make the ids random, is
    switched off in ``document``.
    """
    model = document.get("model")
    if not isinstance(model, dict):
        raise ModelFileError("tokenizer.json is damaged: it has no 'model'.")
    kind = model.setdefault("type", "BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram"):
        raise ModelFileError(f"tokenizer.json holds a model of type {kind!r}; only BPE and Unigram are supported.")
    vocab = model.get("vocab")
    if kind == "BPE":
        _check_bpe(model, vocab)
        model["dropout"] = None
    elif not isinstance(vocab, list) or len(vocab) > MAX_VOCAB or not all(_is_scored_piece(item) for item in vocab):
        raise ModelFileError("tokenizer.json is damaged: the Unigram vocabulary must be pairs of a text and a number.")
    added = document.get("added_tokens")
    if added is None:
        added = document["added_tokens"] = []
    if not isinstance(added, list) or len(added) > MAX_VOCAB or not all(_is_added_token(token) for token in added):
        raise ModelFileError("tokenizer.json is damaged: each of added_tokens needs an id in range and a content.")
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        steps = list(_steps(document.get(name)))
        if len(steps) > _MAX_STEPS:
            raise ModelFileError(f"tokenizer.json holds {len(steps)} steps in its {name}, more than {_MAX_STEPS}.")
        if name != "post_processor" and _growth(steps) > _MAX_GROWTH:
            raise ModelFileError(
                f"The {name} of tokenizer.json would make a text more than {_MAX_GROWTH} times longer."
            )


def token_bytes_of(document: dict[str, Any], special_ids: Set[int]) -> tuple[list[bytes], dict[int, str], bool]:
    """Of a checked document: the bytes of each id, the texts of the special ids, and whether decoding takes one space
    from the start of the text. Ids that no token has add nothing.

    Byte-level vocabularies write each byte as one character (Radford et al. 2019, the table of GPT-2); byte-fallback
    ones write ``<0x0A>``, and a space as U+2581 (SentencePiece, arXiv 1808.06226).
    """
    model = document["model"]
    vocab = model["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    added = {token["id"]: token["content"] for token in document["added_tokens"]}
    size = max([*pieces.values(), *added], default=-1) + 1
    if size == 0:
        raise ModelFileError("tokenizer.json is damaged: its vocabulary is empty.")
    steps = list(_steps(document.get("decoder")))
    kinds = {step.get("type") for step in steps}
    unsupported = kinds - {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip"}
    if unsupported:
        raise ModelFileError(f"The decoder of tokenizer.json has a step of type {unsupported.pop()!r}, not supported.")
    if not steps:
        kinds |= {step.get("type") for step in _steps(document.get("pre_tokenizer"))} & {"ByteLevel", "Metaspace"}
    result = [b""] * size
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        for piece, i in pieces.items():
            try:
                result[i] = bytes([table[character] for character in piece])
            except KeyError:
                result[i] = piece.encode()
        strips = False
    else:
        fallback = bool(kinds & {"ByteFallback"}) or model.get("byte_fallback") is True
        for piece, i in pieces.items():
            match = _BYTE_TOKEN.fullmatch(piece) if fallback else None
            result[i] = bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()
        strips = any(step.get("type") == "Strip" and step.get("start") == 1 for step in steps) or any(
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
        )
    for i, text in added.items():
        result[i] = b"" if i in special_ids else text.encode()
    return result, {i: added[i] for i in special_ids}, strips


def _check_bpe(model: dict[str, Any], vocab: object) -> None:
    if not isinstance(vocab, dict) or len(vocab) > MAX_VOCAB:
        raise ModelFileError(f"tokenizer.json is damaged: the vocabulary must map at most {MAX_VOCAB} texts to ids.")
    if not all(type(i) is int and 0 <= i < MAX_VOCAB for i in vocab.values()):
        raise ModelFileError(f"tokenizer.json is damaged: a token's id is not between 0 and {MAX_VOCAB - 1}.")
    if not all(_is_text(piece) for piece in vocab):
        raise ModelFileError("tokenizer.json is damaged: a token is not a valid Unicode text of sane length.")
    if len(set(vocab.values())) != len(vocab):
        raise ModelFileError("tokenizer.json is damaged: two tokens have the same id.")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > _MAX_AFFIX:
            raise ModelFileError(f"tokenizer.json is damaged: its {name} is longer than {_MAX_AFFIX} characters.")
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > _MAX_MERGES:
        raise ModelFileError(f"tokenizer.json is damaged: the merges must be a list of at most {_MAX_MERGES}.")


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_TOKEN_BYTES:
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_scored_piece(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and _is_text(item[0]) and type(item[1]) in (int, float)


def _is_added_token(token: object) -> bool:
    return (
        isinstance(token, dict)
        and type(token.get("id")) is int
        and 0 <= token["id"] < MAX_VOCAB
        and _is_text(token.get("content"))
    )


def _steps(part: object) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, decoder or post-processor, with sequences unfolded."""
    if part is None:
        return
    if not isinstance(part, dict) or not isinstance(part.get("type", ""), str):
        raise ModelFileError("tokenizer.json is damaged: a step of its pipeline is not an object with a type.")
    nested = [
        value
        for key in ("normalizers", "pretokenizers", "decoders", "processors")
        if isinstance(value := part.get(key), list)
    ]
    if not nested:
        yield part
    for steps in nested:
        for step in steps:
            yield from _steps(step)


def _growth(steps: list[dict[str, Any]]) -> float:
    """An upper bound of how many times longer these steps make a text."""
    growth = 1.0
    for step in steps:
        content, pattern = step.get("content"), step.get("pattern")
        if step.get("type") == "Replace" and isinstance(content, str):
            found = pattern.get("String") if isinstance(pattern, dict) else None
            shortest = len(found.encode(errors="replace")) if isinstance(found, str) else 1
            growth *= max(1.0, len(content.encode(errors="replace")) / max(1, shortest))
        if isinstance(before := step.get("prepend"), str):
            growth *= 1 + len(before.encode(errors="replace"))
    return growth


def _byte_level_table() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(rest)})
    return table

"""A tokenizer rebuilt from the metadata of a GGUF file, as a ``tokenizer.json`` document.

The keys are those of the GGUF specification (``tokenizer.ggml.*``). Two kinds are rebuilt: ``gpt2``, byte-level BPE
with merges, and ``llama``, SentencePiece BPE with scores and byte fallback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.errors import ModelFileError

MAX_VOCAB = 1 << 20
MAX_TOKEN_BYTES = 1 << 16

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNDERLINE = "\u2581"  # SentencePiece writes a space as this
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Tokens that end a turn whatever the file names as its end of sequence: older files leave out eot_token_id.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<|return|>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How the text is cut before BPE; ``regex`` is None for GPT-2's own pattern."""

    regex: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False  # a piece that is a token as it is needs no merges
    nfc: bool = False


_GPT2_LIKE = _PreTokenizer()
_SINGLE_DIGITS = _PreTokenizer(single_digits=True)
_LLAMA3_LIKE = _PreTokenizer(_LLAMA3, ignore_merges=True)
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "default": _GPT2_LIKE,
    "gpt-2": _GPT2_LIKE,
    "phi-2": _GPT2_LIKE,
    "mpt": _GPT2_LIKE,
    "olmo": _GPT2_LIKE,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3_LIKE,
    "llama3": _LLAMA3_LIKE,
    "llama-v3": _LLAMA3_LIKE,
    "smaug-bpe": _PreTokenizer(_LLAMA3),
    "qwen2": _PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(_QWEN2),
    "tekken": _PreTokenizer(_TEKKEN, ignore_merges=True),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """What ``load_tokenizer`` needs: a tokenizer.json document and the ids that the file names."""

    document: dict[str, Any]
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    add_bos_token: bool
    add_eos_token: bool
    chat_template: str | None


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """Rebuild the tokenizer that GGUF ``metadata`` describes.

    Raises ``ModelFileError`` where a key is missing, of the wrong kind, or describes a tokenizer that is not
    supported. A missing ``tokenizer.ggml.pre`` means GPT-2's pattern, as in files written before the key existed.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelFileError(
            f"tokenizer.ggml.model is {kind!r}, and only 'gpt2' and 'llama' can be rebuilt: "
            "use the model's Hugging Face folder with its tokenizer.json."
        )
    tokens = _tokens(metadata)
    types = _integers(metadata, "tokenizer.ggml.token_type", len(tokens), _NORMAL)
    bos = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    ends = [_token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in ("eos", "eot", "eom")]
    unknown = _token_id(metadata, "tokenizer.ggml.unknown_token_id", len(tokens))
    eos = {end for end in ends if end is not None}
    eos |= {i for i, text in enumerate(tokens) if text in _END_OF_TURN and types[i] in (_CONTROL, _USER_DEFINED)}
    special = {i for i, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN)} | eos
    special |= {i for i in (bos,) if i is not None}
    build = _byte_level_document if kind == "gpt2" else _sentencepiece_document
    document = build(metadata, tokens, types, unknown)
    document["added_tokens"] = [
        _added_token(i, tokens[i], special=i in special)
        for i in range(len(tokens))
        if i in special or types[i] == _USER_DEFINED
    ]
    template = metadata.get("tokenizer.chat_template")
    return GgufTokenizer(
        document=document,
        bos_token_id=bos,
        eos_token_ids=frozenset(eos),
        add_bos_token=_flag(metadata, "tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None,
        add_eos_token=_flag(metadata, "tokenizer.ggml.add_eos_token", False) and ends[0] is not None,
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_document(
    metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int], unknown: int | None
) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = _PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise ModelFileError(
            f"tokenizer.ggml.pre is {name!r}, a way to cut text that is not known here: "
            "use the model's Hugging Face folder with its tokenizer.json."
        )
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = _merges(metadata, tokens, vocab)
    prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": pre.regex is None}
    steps: list[dict[str, Any]] = []
    if pre.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if pre.regex is not None:
        steps.append({"type": "Split", "pattern": {"Regex": pre.regex}, "behavior": "Isolated", "invert": False})
    return _document(
        normalizer={"type": "NFC"} if pre.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_bpe(vocab, merges, ignore_merges=pre.ignore_merges),
    )


def _sentencepiece_document(
    metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int], unknown: int | None
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, Sequence) or len(scores) != len(tokens):
        raise ModelFileError("tokenizer.ggml.scores must hold one number for each of tokenizer.ggml.tokens.")
    try:
        ranks = [float(score) for score in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFileError("tokenizer.ggml.scores holds a value that is not a number.") from error
    vocab = {text: i for i, text in enumerate(tokens)}
    pieces = {text for i, text in enumerate(tokens) if types[i] in (_NORMAL, _USER_DEFINED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for i, text in enumerate(tokens):
        if types[i] != _NORMAL or len(text) > 256:  # SentencePiece's own limit is 16 characters by default
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                merges.append((-ranks[i], vocab[left], vocab[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERLINE}
    normalizers = [{"type": "Prepend", "prepend": _UNDERLINE}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _UNDERLINE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    has_bytes = any(type_ == _BYTE for type_ in types) or any(_BYTE_TOKEN.fullmatch(text) for text in tokens)
    return _document(
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocab,
            [(left, right) for *_, left, right in merges],
            byte_fallback=has_bytes,
            unk_token=None if unknown is None else tokens[unknown],
        ),
    )


def _document(*, normalizer: Any, pre_tokenizer: Any, decoder: Any, model: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
    unk_token: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _added_token(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary, every entry distinct: a repeated text can only be its first id's."""
    raw = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or not raw:
        raise ModelFileError("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary.")
    if len(raw) > MAX_VOCAB:
        raise ModelFileError(f"tokenizer.ggml.tokens holds {len(raw)} entries, more than the limit of {MAX_VOCAB}.")
    seen: set[str] = set()
    tokens = []
    for i, text in enumerate(raw):
        if not isinstance(text, str) or len(text) > MAX_TOKEN_BYTES:
            raise ModelFileError(f"tokenizer.ggml.tokens[{i}] is not a text of at most {MAX_TOKEN_BYTES} characters.")
        unique = text
        if not unique or unique in seen:  # some converters pad the vocabulary with empty or repeated entries
            unique = f"[UNUSED {i}] {text}"
        seen.add(unique)
        tokens.append(unique)
    return tokens


def _merges(metadata: Mapping[str, Any], tokens: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    raw = metadata.get("tokenizer.ggml.merges")
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise ModelFileError("tokenizer.ggml.merges is missing: a byte-level tokenizer needs it.")
    merges = []
    for i, merge in enumerate(raw):
        # A piece may itself hold spaces after its first character, so the cut is the first one after that.
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise ModelFileError(f"tokenizer.ggml.merges[{i}] is not two pieces with a space between them.")
        left, right = merge[:cut], merge[cut + 1 :]
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFileError(f"tokenizer.ggml.merges[{i}] joins pieces that tokenizer.ggml.tokens does not hold.")
        merges.append((tokens[vocab[left]], tokens[vocab[right]]))  # the same objects: a hundred thousand fewer
    return merges


def _integers(metadata: Mapping[str, Any], key: str, count: int, default: int) -> Sequence[int]:
    raw = metadata.get(key)
    if raw is None:
        return [default] * count
    if not isinstance(raw, Sequence) or len(raw) != count or not all(isinstance(value, int) for value in raw):
        raise ModelFileError(f"{key} must hold one integer for each of tokenizer.ggml.tokens.")
    return raw


def _token_id(metadata: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    value = metadata.get(key)
    if value is None or value in (0xFFFFFFFF, -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ModelFileError(f"{key} is {value!r}, which is no id of a vocabulary of {vocab_size} tokens.")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{key} is {value!r}, not true or false.")
    return value

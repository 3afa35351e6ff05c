"""What a corpus needs of a tokenizer beside its ids: where documents end, its identity, and a folder to keep it in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fallow.files import replacing
from fallow.models.tokenizer import Tokenizer


def boundary_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens before and after a document: what the tokenizer puts around every text, and an end-of-sequence token
    after it, unless there is one already.

    A tokenizer that was trained here puts ``<|endoftext|>`` before a text, so its documents begin with that token, and
    it is the token that a model learns to write where a document ends: the beginning of the next one.
    """
    ends = tokenizer.eos_token_ids
    if not ends or ends & {*tokenizer.prefix, *tokenizer.suffix}:
        return tokenizer.prefix, tokenizer.suffix
    return tokenizer.prefix, [*tokenizer.suffix, min(ends)]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides about the ids of a document: the tokenizer, its boundary tokens, its chat template."""
    template = tokenizer.chat_template
    parts = [
        json.loads(tokenizer.backend.to_str()),
        boundary_tokens(tokenizer),
        [template.source, template.bos_token, template.eos_token] if template is not None else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, of which ``load_tokenizer`` and the ``AutoTokenizer`` of
    ``transformers`` make a tokenizer that gives the same ids.

    Of several end-of-sequence tokens only the smallest has a place here; the others belong into the model's
    ``generation_config.json``. Raises ``OSError`` as the disk does.
    """
    document = json.loads(tokenizer.backend.to_str())
    if tokenizer.backend.encode("a").ids != tokenizer.encode("a"):  # metadata of a GGUF file said otherwise
        document["post_processor"] = _post_processor(tokenizer)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    if tokenizer.eos_token_ids:
        config["eos_token"] = tokenizer.token_text(min(tokenizer.eos_token_ids))
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template.source
    for name, value in (("tokenizer.json", document), ("tokenizer_config.json", config)):
        with replacing(folder / name) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n")


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The step of a ``tokenizer.json`` that puts ``prefix`` and ``suffix`` around a text."""
    around = [*tokenizer.prefix, *tokenizer.suffix]
    if not around:
        return None
    texts = {token: tokenizer.token_text(token) for token in around}

    def special(ids: list[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": texts[token], "type_id": 0}} for token in ids]

    def whole(name: str) -> list[dict[str, Any]]:
        return [*special(tokenizer.prefix), {"Sequence": {"id": name, "type_id": 0}}, *special(tokenizer.suffix)]

    return {
        "type": "TemplateProcessing",
        "single": whole("A"),
        "pair": [*whole("A"), *whole("B")],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in texts.items()},
    }

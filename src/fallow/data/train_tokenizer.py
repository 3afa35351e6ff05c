"""A byte-level BPE tokenizer trained on a source (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fallow.data.sources import Source
from fallow.errors import FallowError
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # the bytes and the end of a text
_REPORT_EVERY = 16  # documents
# Words as in GPT-4's tokenizer, but numbers in groups of one to two digits: small vocabularies have no room for more.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    source: Source, vocab_size: int, *, max_bytes: int = 1 << 28, progress: Progress | None = None
) -> Tokenizer:
    """A tokenizer of ``vocab_size`` tokens from the first ``max_bytes`` of ``source``; every text can be written in it.

    Token 0 is ``<|endoftext|>``: the beginning- and the end-of-sequence token, which ``encode`` puts before a text.
    The same source gives the same tokenizer. ``progress`` is called with the bytes that were read. Raises
    ``FallowError`` where the source is empty or has too little text for so many tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise FallowError(f"vocab_size is {vocab_size}: it must be at least {SMALLEST_VOCABULARY}, the bytes and one.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(source, max_bytes, progress), trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise FallowError(
            f"{source.name} has too little text for {vocab_size} tokens: only {found} were found; ask for fewer."
        )
    return tokenizer_of(backend)


def tokenizer_of(backend: tokenizers.Tokenizer) -> Tokenizer:
    """``backend``, whose token 0 is ``<|endoftext|>``, as a ``Tokenizer`` that begins every text with that token."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    return Tokenizer(json.loads(backend.to_str()), bos_token_id=0, eos_token_ids=[0])


def _texts(source: Source, max_bytes: int, progress: Progress | None) -> Iterator[str]:
    done = 0
    for count, document in enumerate(source.documents()):
        contents = (message["content"] for message in document.messages)
        for text in (document.text, *(content for content in contents if isinstance(content, str))):
            if done >= max_bytes:
                return
            yield text
            done += len(text.encode())
        if progress is not None and count % _REPORT_EVERY == 0:
            progress(f"reading {source.name} for a tokenizer", done, None)

"""Which documents are for validation: their texts alone decide, so every tokenizer is validated on the same ones."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fallow.data.sources import Document, Source
from fallow.errors import FallowError
from fallow.terminal import Progress

TRAIN, VALID = "train", "valid"
_REPORT_EVERY = 16  # documents


@dataclass(frozen=True)
class Survey:
    """A source that was read once to its end: what is in it, and that all of it can be read.

    For each document, ``digests`` identify the text and ``sizes`` are its bytes in UTF-8.
    """

    name: str
    conversations: bool
    digests: array[int]
    sizes: array[int]

    @property
    def text_bytes(self) -> int:
        return sum(self.sizes)


def survey(source: Source, progress: Progress | None = None) -> Survey:
    """Read all of ``source``. ``progress`` is called with the bytes of text so far.

    Raises ``FallowError`` where something cannot be read, and where texts and conversations are mixed.
    """
    digests, sizes = array("Q"), array("Q")
    conversations, done = False, 0
    for document in source.documents():
        if not sizes:
            conversations = bool(document.messages)
        elif bool(document.messages) != conversations:
            raise FallowError(f"{document.where}: texts and conversations are mixed; put them into separate sources.")
        content = content_of(document)
        digests.append(digest_of(content))
        sizes.append(len(content))
        done += len(content)
        if progress is not None and len(sizes) % _REPORT_EVERY == 0:
            progress(f"reading {source.name}", done, None)
    return Survey(source.name, conversations, digests, sizes)


def content_of(document: Document) -> bytes:
    """What tells a document from others: its text, or its messages as JSON."""
    text = json.dumps(document.messages, sort_keys=True, default=str) if document.messages else document.text
    return text.encode()


def digest_of(content: bytes) -> int:
    """The first 64 bits of a SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


@dataclass(frozen=True)
class Split:
    """A share of a source for validation, and the rest of it.

    Documents are taken in the order of their digests, which has nothing to do with their place or their subject, until
    their bytes make up the share; equal texts go together. A document that is larger than the share is not taken. Where
    each is larger, as in a single file, the largest is cut, and the share is its end. ``tail`` is then the part of that
    document which is for validation.
    """

    held_out: frozenset[int]
    tail: float | None

    @staticmethod
    def of(survey: Survey, share: float) -> Split:
        """Raises ``FallowError`` where ``share`` is not between 0 and a half, or there is one conversation only."""
        if not 0 < share < 0.5:
            raise FallowError(f"The share of text for validation is {share}: it must be above 0 and below 0.5.")
        digests, group = np.unique(np.array(survey.digests, np.uint64), return_inverse=True)
        sizes = np.bincount(group, weights=np.array(survey.sizes, np.float64))
        wanted = share * sizes.sum()
        candidates = np.flatnonzero(sizes <= wanted)
        if len(candidates):
            count = int(np.searchsorted(np.cumsum(sizes[candidates]), wanted)) + 1
            return Split(frozenset(digests[candidates[:count]].tolist()), tail=None)
        if survey.conversations:
            raise FallowError(
                f"{survey.name} has too few conversations to keep a share of {share} for validation: "
                "give a source of its own for that."
            )
        largest = int(np.argmax(sizes))
        return Split(frozenset({int(digests[largest])}), tail=float(wanted / sizes[largest]))

    def parts(self, document: Document) -> Iterator[tuple[str, Document]]:
        """``TRAIN`` or ``VALID`` with the document, or both with a part of its text each.

        Raises ``FallowError`` where the text is too short to be cut.
        """
        if digest_of(content_of(document)) not in self.held_out:
            yield TRAIN, document
        elif self.tail is None:
            yield VALID, document
        else:
            text = document.text
            cut = round(len(text) * (1 - self.tail))
            line = text.find("\n", cut) + 1
            if line and text[line:].strip():
                cut = line
            if not text[:cut].strip() or not text[cut:].strip():
                raise FallowError(
                    f"{document.where} is too short to keep a share of it for validation: give more text."
                )
            yield TRAIN, replace(document, text=text[:cut])
            yield VALID, replace(document, text=text[cut:])

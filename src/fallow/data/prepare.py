"""From a source to token shards: made once for each text and tokenizer, and found again the next time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fallow.data.conversations import conversation_tokens
from fallow.data.shards import INDEX, VERSION, ShardWriter, TokenShards
from fallow.data.sources import Document, Source
from fallow.data.split import TRAIN, VALID, Split, content_of, survey
from fallow.data.tokenizers import boundary_tokens, tokenizer_digest
from fallow.errors import FallowError
from fallow.files import locked, replacing_folder
from fallow.models.store import store_path
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

_PIECE = 1 << 14  # characters; longer texts are cut between two words, so that their parts are tokenized in parallel
_PIECES_AT_ONCE = 256
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def prepare(
    source: Source, tokenizer: Tokenizer, *, folder: Path | None = None, progress: Progress | None = None
) -> TokenShards:
    """The token shards of ``source``, from ``folder`` (``corpora`` in the model store) or made there now.

    Every text becomes its tokens between those of ``boundary_tokens``; what looks like a special token in it is plain
    characters. Every conversation becomes what ``conversation_tokens`` makes of it. ``progress`` is called with what is
    being done, and bytes of text done and in all. An interrupted run leaves nothing that is taken for complete, and two
    processes make a corpus once. Raises ``FallowError`` where the source cannot be used, the disk has no room, or
    shards that were made before are damaged.
    """
    return TokenShards(_made(source, tokenizer, None, folder, progress) / TRAIN)


def prepare_split(
    source: Source,
    tokenizer: Tokenizer,
    share: float,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[TokenShards, TokenShards]:
    """As ``prepare``, in two parts: shards to train on, and shards of ``share`` of the text for validation.

    ``Split`` says which texts these are. The two have no document in common, so no window of one can hold text of the
    other.
    """
    made = _made(source, tokenizer, share, folder, progress)
    return TokenShards(made / TRAIN), TokenShards(made / VALID)


def _made(
    source: Source, tokenizer: Tokenizer, share: float | None, folder: Path | None, progress: Progress | None
) -> Path:
    """The folder that holds the shards, which are made where they are not there."""
    root = folder or store_path() / "corpora"
    fingerprint, digest = source.fingerprint(), tokenizer_digest(tokenizer)
    key = json.dumps([VERSION, fingerprint, digest, share])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    place = root / name
    parts = (TRAIN,) if share is None else (TRAIN, VALID)
    try:
        with locked(root / f"{name}.lock"):
            if not all((place / part / INDEX).is_file() for part in parts):
                with replacing_folder(place) as partial:
                    _write(partial, source, tokenizer, share, fingerprint=fingerprint, digest=digest, progress=progress)
    except OSError as error:
        raise FallowError(
            f"The token shards of {source.name} cannot be written to {root}: {error.strerror or error}; "
            "free some space or set FALLOW_HOME to another folder."
        ) from error
    return place


def _write(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    share: float | None,
    *,
    fingerprint: str,
    digest: str,
    progress: Progress | None,
) -> None:
    found = survey(source, progress)
    split = None if share is None else Split.of(found, share)
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(
                ShardWriter(folder / part, tokenizer.token_bytes, has_answers=found.conversations)
            )
            for part in ((TRAIN,) if split is None else (TRAIN, VALID))
        }
        assigned = (
            (document, writers[part])
            for whole in source.documents()
            for part, document in ([(TRAIN, whole)] if split is None else split.parts(whole))
        )
        done, write = 0, _write_conversations if found.conversations else _write_texts
        for text_bytes in write(assigned, tokenizer):
            done += text_bytes
            if progress is not None:
                progress(f"tokenizing {source.name}", done, found.text_bytes)
        for part, writer in writers.items():
            name = f"{source.name}, validation" if part == VALID else source.name
            writer.finish(source=name, fingerprint=fingerprint, tokenizer=digest)


@dataclass(frozen=True)
class _Piece:
    """A part of a document's text, tokenized by itself. ``whole_bytes`` are those of the document, at its beginning."""

    text: str
    writer: ShardWriter
    whole_bytes: int | None
    is_last: bool


def _write_texts(assigned: Iterator[tuple[Document, ShardWriter]], tokenizer: Tokenizer) -> Iterator[int]:
    """Write documents and yield the bytes of text that were written, as it goes."""
    before, after = boundary_tokens(tokenizer)
    can_cut = _gives_the_same_in_pieces(tokenizer)
    pieces = (piece for document, writer in assigned for piece in _pieces(document.text, writer, can_cut=can_cut))
    while batch := list(islice(pieces, _PIECES_AT_ONCE)):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            first = piece.whole_bytes is not None
            if piece.whole_bytes is not None:
                piece.writer.begin_document(piece.whole_bytes)
            piece.writer.write([*(before if first else ()), *ids, *(after if piece.is_last else ())])
        yield sum(len(piece.text.encode()) for piece in batch)


def _write_conversations(assigned: Iterator[tuple[Document, ShardWriter]], tokenizer: Tokenizer) -> Iterator[int]:
    for document, writer in assigned:
        tokens, answers = conversation_tokens(tokenizer, document.messages, document.where)
        writer.begin_document(sum(len(tokenizer.token_bytes[token]) for token in tokens))
        writer.write(tokens, answers)
        yield len(content_of(document))


def _pieces(text: str, writer: ShardWriter, *, can_cut: bool) -> Iterator[_Piece]:
    cuts = [0]
    while can_cut and (found := _BETWEEN_WORDS.search(text, cuts[-1] + _PIECE)):
        cuts.append(found.start())
    for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        whole_bytes = len(text.encode()) if start == 0 else None
        yield _Piece(text[start:end], writer, whole_bytes, is_last=end == len(text))


def _gives_the_same_in_pieces(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut before a space between letters: not so where each text gets a space of its own."""
    whole, first, second = tokenizer.encode_batch(["one two", "one", " two"])
    return whole == [*first, *second]

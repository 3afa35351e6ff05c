"""Training sequences: windows of a corpus in an order that the seed and their number alone decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fallow.data.shards import Ints, TokenShards
from fallow.errors import FallowError

NOT_COUNTED = -1
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """``inputs`` and the ``targets`` that follow them, token ids int64 ``[sequences, context]``.

    ``scored`` says which targets count (``[sequences, context]``; None: all; none of a window's may), ``documents``
    numbers the documents of the inputs of each window from 0 (``[sequences, context]``; None: attention may cross from
    one to the next).
    """

    inputs: Ints
    targets: Ints
    scored: Bools | None = None
    documents: Ints | None = None

    def counted_targets(self) -> Ints:
        """``targets``, with ``NOT_COUNTED`` where one does not count, ``[sequences, context]``."""
        return self.targets if self.scored is None else np.where(self.scored, self.targets, NOT_COUNTED)

    def in_bags(self, size: int) -> Batch:
        """``size`` tokens that follow one another as one position, whose targets are the tokens of the next one:
        ``inputs`` and ``targets`` are ``[sequences, context / size, size]``. Targets beyond the window do not count."""
        sequences, context = self.inputs.shape
        assert self.documents is None
        assert context % size == 0
        following = np.full((sequences, context), NOT_COUNTED, dtype=self.targets.dtype)
        following[:, : context - size + 1] = self.counted_targets()[:, size - 1 :]
        shape = (sequences, context // size, size)
        return Batch(self.inputs.reshape(shape), following.reshape(shape))


class Windows:
    """The corpus cut into windows of ``context`` tokens that do not overlap, shuffled anew in each epoch.

    Sequence ``n`` is window ``permutation(seed, n // len)[n % len]``: where a run is in its data is one number. With
    ``isolate_documents`` a batch says where documents begin, so that attention can stop there. The tokens after the
    last whole window are left out.
    """

    def __init__(self, shards: TokenShards, context: int, *, seed: int, isolate_documents: bool = False) -> None:
        """Raises ``FallowError`` where the corpus has not one window."""
        self.shards = shards
        self.context = context
        self._seed = seed
        self._isolate = isolate_documents
        self._count = (len(shards) - 1) // context
        if self._count < 1:
            raise FallowError(
                f"{shards.index.source} has {len(shards)} tokens, fewer than one window of {context} and the token "
                "after it: give more text or a shorter context."
            )
        self._permutation = lru_cache(maxsize=2)(self._permuted)

    def __len__(self) -> int:
        return self._count

    def batch(self, first: int, count: int) -> Batch:
        """Sequences ``first`` to ``first + count``."""
        places = [divmod(sequence, self._count) for sequence in range(first, first + count)]
        return self._read([int(self._permutation(epoch)[place]) for epoch, place in places])

    def in_order(self, first: int, count: int) -> Batch:
        """Windows ``first`` to ``first + count`` as they stand in the corpus: for evaluation."""
        return self._read(list(range(first, first + count)))

    def bytes_of(self, targets: Ints) -> int:
        """The bytes of text that ``targets`` stand for, those of ``NOT_COUNTED`` left out and special tokens as 0."""
        return int(self.shards.token_bytes[targets[targets >= 0]].sum(dtype=np.int64))

    def _read(self, windows: list[int]) -> Batch:
        context, shards = self.context, self.shards
        starts = [window * context for window in windows]
        tokens = np.stack([shards.read(start, context + 1) for start in starts])
        return Batch(
            tokens[:, :-1],
            tokens[:, 1:],
            scored=np.stack([shards.read_answers(start + 1, context) for start in starts])
            if shards.index.has_answers
            else None,
            documents=np.stack([self._documents(start) for start in starts]) if self._isolate else None,
        )

    def _documents(self, start: int) -> Ints:
        """The number of the document of each token of a window, the first one's 0."""
        positions = np.arange(start, start + self.context)
        numbers = np.searchsorted(self.shards.document_starts, positions, side="right")
        relative: Ints = numbers - numbers[0]
        return relative

    def _permuted(self, epoch: int) -> Ints:
        # From raw bits, which NumPy promises to keep; what its ``Generator`` makes of them may change (NEP 19).
        bits = np.random.PCG64(np.random.SeedSequence((self._seed, epoch))).random_raw(self._count)
        return np.argsort(bits, kind="stable")


def bits_per_byte(nll: float, text_bytes: int) -> float:
    """``nll``, the summed negative log-likelihood (nats) of targets, in bits over their bytes (``Windows.bytes_of``).

    Unlike the loss of a token, it can be compared between tokenizers: special tokens cost bits and stand for no bytes.
    """
    return nll / math.log(2) / max(text_bytes, 1)

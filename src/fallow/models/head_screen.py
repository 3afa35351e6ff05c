"""A screen of the head: from one product with few bits of its rows which tokens may be likely; only these are computed.

The vocabulary's rows are of full rank (on SmolLM2-135M a rank of 128 of 576 leaves an error of 1.4 to 1.9 nats), but a
sign tells most of what a row has to say along a direction. So hidden states and rows are turned into a basis in which
the former are uncorrelated and the latter's columns independent (a principal component analysis of the logits), and
the screen keeps of each row its numbers along the ``DIRECTIONS`` that matter most in 8 bits, along the others signs,
and one scale for all signs. A direction gets as many signs as it is worth, each for what those before it leave, as
reverse water-filling shares bits out over components of different variance (Cover and Thomas, Elements of Information
Theory, section 10.3.3); no direction's worth is trusted to the full, as other text has other hidden states.

The signs that are worth most are looked at for all rows, the others for the likeliest twelfth of them in a second look,
after which the largest logits are told apart (as codes of product quantisation are refined for what is ranked again:
Jégou et al., Searching in one billion vectors: re-rank with source coding, ICASSP 2011).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fallow.arrays import Bools, Float32, Float64, Int32, Int64
from fallow.errors import ModelFileError
from fallow.files import replacing
from fallow.models.dequantize import dequantize_rows
from fallow.models.safetensors import read_header
from fallow.models.tensors import Checkpoint, RawTensor

DIRECTIONS = 4
SIGN_GROUP = 32  # columns whose signs lie together: hidden sizes are multiples of it
LOOKS = 2
LIKELY = 3.0
_LOOKED_AT_AGAIN = 12  # one of so many tiles
SCREEN_FILE = "head_screen.safetensors"
_BLOCK = 4096  # rows at a time
_UNSEEN_VARIANCE = 0.5  # of hidden states in any direction, in units of the median one: what text did not show may be
_LEAST_VARIANCE = 1e-2  # at least, in units of the mean one: short text leaves most directions out
_SIZES = (1e-12, 1e12)  # what units and deviations can be: squares of others may not be numbers
_EVENNESS = 0.6  # the power of a variance that counts as the worth of a direction
_SIGN_SIZES = (0.7979, 0.4834, 0.2695, 0.1599, 0.1012)
"""Of numbers from a normal distribution of variance 1 the mean magnitude, of what a sign of that size leaves again the
mean magnitude, and so on;"""
_LEFT = (1.0, 0.3634, 0.1306, 0.0585, 0.0330, 0.0227)
"""and the mean square that 0, 1, 2, ... signs leave."""


@dataclass(frozen=True)
class SignColumns:
    """Which signs there are: each of a direction of the basis, ``directions [n]``, that it changes by its size,
    ``sizes [n]``; it is the sign of what the direction's ``ranks [n]`` signs of a larger size leave. The first look is
    at the ``first`` ones."""

    directions: Int32
    ranks: Int32
    first: int

    @property
    def sizes(self) -> Float32:
        return np.array(_SIGN_SIZES, np.float32)[self.ranks]

    def by_rank(self) -> Iterator[tuple[np.float32, Int64, Int32]]:
        """Of the largest signs first, then of those of each further rank: size, places, and directions."""
        for rank, size in enumerate(_SIGN_SIZES):
            places = np.flatnonzero(self.ranks == rank)
            yield np.float32(size), places, self.directions[places]


@dataclass(frozen=True)
class RowCodes:
    """What a screen keeps of rows: ``along [n, DIRECTIONS]``, ``positive [columns, n]`` and ``scales [n]``."""

    along: Float32
    positive: Bools
    scales: Float32


@dataclass(frozen=True)
class HeadScreen:
    """What the screen of a head needs beside its rows.

    ``projection [hidden, hidden]`` turns hidden states into the basis, most important direction first, in units in
    which rows have a mean square of 1 along each; ``units [hidden]``: how large hidden states are along each then.
    ``deviations [LOOKS, vocab]``: of each row the standard deviation of the screen's error after each look, in nats,
    over text that varies a little more than what was seen.
    """

    projection: Float32
    units: Float32
    deviations: Float32

    @cached_property
    def directions(self) -> Float32:
        """What turns rows into the basis, ``[hidden, hidden]``: a row times a hidden state is the same there."""
        inverse: Float32 = np.linalg.inv(self.projection.astype(np.float64)).astype(np.float32)
        return inverse

    @staticmethod
    def fit(covariance: Float64, head: RawTensor) -> HeadScreen:
        """The screen of ``head [vocab, hidden]`` for hidden states (normalised, as the head reads them) whose products'
        mean is ``covariance [hidden, hidden]``."""
        values, vectors = np.linalg.eigh(covariance)
        values = values.clip(0) + max(_UNSEEN_VARIANCE * np.median(values), _LEAST_VARIANCE * values.mean())
        root = (vectors * np.sqrt(values)) @ vectors.T
        inverse = (vectors / np.sqrt(values)) @ vectors.T
        products = np.zeros_like(covariance)
        for rows in row_blocks(head):
            products += rows.T.astype(np.float64) @ rows
        sizes, basis = np.linalg.eigh(root @ products @ root)
        sizes, basis = sizes[::-1], basis[:, ::-1]
        units = np.sqrt(np.maximum(sizes, 1e-16 * sizes[0]) / head.shape[0])  # of rows along each direction
        projection = np.ascontiguousarray((inverse @ basis * units).T.astype(np.float32))
        screen = HeadScreen(projection, units.astype(np.float32), np.zeros((LOOKS, head.shape[0]), np.float32))
        return replace(screen, deviations=screen._deviations(head))

    def _deviations(self, head: RawTensor) -> Float32:
        """Coordinates of hidden states are uncorrelated, each as large as the unit of its direction."""
        found = []
        for rows in row_blocks(head):
            turned, codes = self.directions.T @ rows.T, self.codes(rows)
            found.append([np.sqrt(self.units**2 @ (turned - self._kept(codes, look)) ** 2) for look in range(LOOKS)])
        deviations: Float32 = np.maximum(np.concatenate(found, axis=1), 1e-6).astype(np.float32)
        return deviations

    @cached_property
    def columns(self) -> SignColumns:
        """Those worth most come first. Of each look in fours that are about as large, together: in tables of their
        sums all are rounded alike."""
        hidden = len(self.units)
        worth = self.units[DIRECTIONS:].astype(np.float64) ** (2 * _EVENNESS)
        gains = [(-(_LEFT[0] - _LEFT[1]) * value, direction, 0) for direction, value in enumerate(worth)]
        heapq.heapify(gains)
        chosen: list[tuple[int, int]] = []
        while len(chosen) < sign_columns(hidden):
            _, direction, rank = heapq.heappop(gains)
            chosen.append((DIRECTIONS + direction, rank))
            if rank + 1 < len(_SIGN_SIZES):
                gain = (_LEFT[rank + 1] - _LEFT[rank + 2]) * worth[direction]
                heapq.heappush(gains, (-gain, direction, rank + 1))
        first = first_sign_columns(hidden)
        directions, ranks = np.array(chosen, np.int32).T
        columns = SignColumns(directions, ranks, first)
        sizes = self.units[columns.directions] * columns.sizes
        order = np.concatenate([_in_fours(sizes[:first]), first + _in_fours(sizes[first:])])
        return replace(columns, directions=columns.directions[order], ranks=columns.ranks[order])

    def codes(self, rows: Float32) -> RowCodes:
        """What is kept of rows of the head ``[n, hidden]``."""
        columns, weights = self.columns, self.units[DIRECTIONS:] ** 2
        turned = self.directions.T @ rows.T
        others = turned[DIRECTIONS:]
        numbers = others / np.maximum(np.sqrt(weights @ others**2 / weights.sum()), 1e-30)  # of variance 1 or so
        left = numbers.copy()
        positive = np.empty((len(columns.ranks), len(rows)), np.bool_)
        for size, places, directions in columns.by_rank():
            signs = left[directions - DIRECTIONS] > 0
            positive[places] = signs
            left[directions - DIRECTIONS] -= np.where(signs, size, -size)
        kept = numbers - left
        scales = (weights @ (kept * others)) / (weights @ kept**2)
        return RowCodes(np.ascontiguousarray(turned[:DIRECTIONS].T), positive, scales)

    def _kept(self, codes: RowCodes, look: int) -> Float32:
        """Rows in the basis ``[hidden, n]`` as their codes have them that a look and those before it are at."""
        kept = np.zeros((len(self.units), len(codes.scales)), np.float32)
        kept[:DIRECTIONS] = codes.along.T
        seen = self.columns.first if look == 0 else len(codes.positive)
        for size, places, directions in self.columns.by_rank():
            among = places < seen
            kept[directions[among]] += np.where(codes.positive[places[among]], size, -size) * codes.scales
        return kept

    def logits(self, hidden: Float32, head: RawTensor, *, look: int = LOOKS - 1) -> Float32:
        """The screen's logits ``[n, vocab]`` of hidden states ``[n, hidden]`` after a look at all rows, without
        rounding: the reference."""
        coordinates = hidden @ self.projection.T
        return np.concatenate([coordinates @ self._kept(self.codes(rows), look) for rows in row_blocks(head)], 1)

    def shortlist(self, hidden: Float32, head: RawTensor, candidates: int, *, tile: int) -> list[Int64]:
        """The tiles of ``tile`` tokens that are computed at once for each row of ``hidden [n, hidden]``: those that
        hold the largest logits after the second look, ``LIKELY`` deviations added, among the ``likely_tiles`` that
        do after the first one."""
        first, second = (
            _peaks(self.logits(hidden, head, look=look) + LIKELY * self.deviations[look], tile) for look in range(LOOKS)
        )
        tiles = -(-candidates // tile)
        found = []
        for before, after in zip(first, second, strict=True):
            likely = np.sort(np.argsort(-before, kind="stable")[: likely_tiles(len(before), tiles)])
            found.append(np.sort(likely[np.argsort(-after[likely], kind="stable")[:tiles]]))
        return found

    @staticmethod
    def beside(checkpoint: Checkpoint) -> HeadScreen:
        """That in the folder of a model's weights. Raises as ``load`` does."""
        path, config = checkpoint.path, checkpoint.config
        folder = path if path.is_dir() else path.parent
        return HeadScreen.load(folder / SCREEN_FILE, vocab_size=config.vocab_size, hidden_size=config.hidden_size)

    @staticmethod
    def load(path: Path, *, vocab_size: int, hidden_size: int) -> HeadScreen:
        """Raises ``ModelFileError`` where the file is not there, damaged, or another model's."""
        if not path.is_file():
            raise ModelFileError(f"The plan screens the head, but {path} is not there: make the plan again.")
        shapes = {
            "projection": (hidden_size, hidden_size),
            "units": (hidden_size,),
            "deviations": (LOOKS, vocab_size),
        }
        tensors = read_header(path)
        arrays = {}
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != "F32" or tensor.shape != shape:
                raise ModelFileError(
                    f"{path} is no screen of this model's head, or one of another version of fallow: {name} must be "
                    f"{list(shape)} numbers of F32. Make the plan again."
                )
            array = tensor.read().view("<f4").astype(np.float32, copy=False).reshape(shape)
            sizes = np.abs(array) if name == "projection" else array
            least = 0.0 if name == "projection" else _SIZES[0]
            if not ((sizes >= least) & (sizes <= _SIZES[1])).all():
                raise ModelFileError(f"{path} is damaged: {name} has values that it cannot have.")
            arrays[name] = array
        screen = HeadScreen(**arrays)
        try:
            turns = bool(np.isfinite(screen.directions).all())
        except np.linalg.LinAlgError:
            turns = False
        if not turns:
            raise ModelFileError(f"{path} is damaged: projection is no basis.")
        return screen

    def save(self, folder: Path) -> None:
        """Write the file that ``beside`` finds (needs the package safetensors)."""
        from safetensors.numpy import save  # noqa: PLC0415

        with replacing(folder / SCREEN_FILE) as file:
            file.write(save({field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}))


def sign_columns(hidden_size: int) -> int:
    """How many signs are kept of a row: eleven sixths of the hidden size, in whole groups."""
    return SIGN_GROUP * -(-11 * hidden_size // (6 * SIGN_GROUP))


def first_sign_columns(hidden_size: int) -> int:
    """How many of them the first look is at: seven ninths of the hidden size, in whole groups."""
    return SIGN_GROUP * -(-7 * hidden_size // (9 * SIGN_GROUP))


def likely_tiles(tiles: int, computed: int) -> int:
    """How many tiles of the vocabulary's are looked at again where so many are to be computed."""
    return max(-(-tiles // _LOOKED_AT_AGAIN), min(2 * computed, tiles))


def _in_fours(sizes: Float32) -> Int64:
    """Places of ``sizes [n]``, a multiple of four: those of each four are about as large, together, as all others."""
    quarters = np.argsort(-sizes, kind="stable").reshape(4, -1)
    quarters[1::2] = quarters[1::2, ::-1]
    return quarters.T.reshape(-1)


def _peaks(logits: Float32, tile: int) -> Float32:
    """The largest of each ``tile`` logits: ``[n, vocab]`` to ``[n, tiles]``."""
    padded = np.pad(logits, ((0, 0), (0, -logits.shape[1] % tile)), constant_values=-np.inf)
    peaks: Float32 = padded.reshape(len(logits), -1, tile).max(2)
    return peaks


def row_blocks(head: RawTensor) -> Iterator[Float32]:
    """The rows of a matrix as float32 ``[n, columns]``, some at a time."""
    raw = head.read()
    for first in range(0, len(raw), _BLOCK):
        yield dequantize_rows(raw[first : first + _BLOCK], head.type)


def mean_products(blocks: Iterable[Float32]) -> Float64:
    """Of hidden states ``[n, hidden]`` in blocks: the mean of ``h h^T``."""
    total: Float64 | None = None
    count = 0
    for block in blocks:
        products = block.T.astype(np.float64) @ block
        total = products if total is None else total + products
        count += len(block)
    assert total is not None, "there are hidden states"
    return total / count

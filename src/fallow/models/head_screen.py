"""A screen of the head: from one product with few bits of its rows which tokens may be likely; only these are computed.

The vocabulary's rows are of full rank (on SmolLM2-135M a rank of 128 of 576 leaves an error of 1.4 to 1.9 nats), but a
sign tells most of what a row has to say along a direction. So hidden states and rows are turned into a basis in which
the former are uncorrelated and the latter's columns independent (a principal component analysis of the logits), and the
screen keeps of each row its numbers along the ``DIRECTIONS`` that matter most in 8 bits, along all others a sign, and
one scale for all signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from fallow.arrays import Float32, Float64, Int64
from fallow.errors import ModelFileError
from fallow.files import replacing
from fallow.models.dequantize import dequantize_rows
from fallow.models.safetensors import read_header
from fallow.models.tensors import Checkpoint, RawTensor

DIRECTIONS = 16
SIGN_GROUP = 32  # columns whose signs lie together: hidden sizes are multiples of it
LIKELY = 1.5
SCREEN_FILE = "head_screen.safetensors"
_BLOCK = 4096  # rows at a time
_LEAST_VARIANCE = 1e-2  # of hidden states in any direction, in units of the mean one: what text did not show may be


@dataclass(frozen=True)
class HeadScreen:
    """What the screen of a head needs beside its rows.

    ``projection [hidden, hidden]`` turns hidden states into the basis, most important direction first, in units in
    which rows have a mean square of 1 along each. ``deviations [vocab]``: of each row the standard deviation of the
    screen's error, in nats.
    """

    projection: Float32
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
        values = np.maximum(values, _LEAST_VARIANCE * values.mean())
        root = (vectors * np.sqrt(values)) @ vectors.T
        inverse = (vectors / np.sqrt(values)) @ vectors.T
        products = np.zeros_like(covariance)
        for rows in row_blocks(head):
            products += rows.T.astype(np.float64) @ rows
        sizes, basis = np.linalg.eigh(root @ products @ root)
        sizes, basis = sizes[::-1], basis[:, ::-1]
        units = np.sqrt(np.maximum(sizes, 1e-30 * sizes[0]) / head.shape[0])  # of rows along each direction
        projection = (inverse @ basis * units).T.astype(np.float32)
        screen = HeadScreen(np.ascontiguousarray(projection), np.zeros(head.shape[0], np.float32))
        return HeadScreen(screen.projection, screen._deviations(head, units[DIRECTIONS:]))

    def _deviations(self, head: RawTensor, units: Float64) -> Float32:
        """Coordinates of hidden states are uncorrelated, each as large as the unit of its direction."""
        found = []
        for rows in row_blocks(head):
            rest = self.parts(rows)[1]
            found.append(np.sqrt((((rest - _signs(rest)) * units) ** 2).sum(1)))
        deviations: Float32 = np.maximum(np.concatenate(found), 1e-6).astype(np.float32)
        return deviations

    def parts(self, rows: Float32) -> tuple[Float32, Float32]:
        """Rows of the head ``[n, hidden]`` in the basis: along the first ``DIRECTIONS``, and along the others."""
        turned = rows @ self.directions
        return turned[:, :DIRECTIONS], turned[:, DIRECTIONS:]

    def logits(self, hidden: Float32, head: RawTensor) -> Float32:
        """The screen's logits ``[n, vocab]`` of hidden states ``[n, hidden]``, without rounding: the reference."""
        coordinates = hidden @ self.projection.T
        first, others = coordinates[:, :DIRECTIONS], coordinates[:, DIRECTIONS:]
        parts = map(self.parts, row_blocks(head))
        return np.concatenate([first @ along.T + others @ _signs(rest).T for along, rest in parts], 1)

    def shortlist(self, hidden: Float32, head: RawTensor, candidates: int, *, tile: int) -> Int64:
        """The tiles of ``tile`` tokens that are computed at once for each row of ``hidden [n, hidden]``: those that
        hold the largest logits, ``LIKELY`` deviations added; ``[n, tiles]``."""
        likely = self.logits(hidden, head) + LIKELY * self.deviations
        padding = -likely.shape[1] % tile
        likely = np.pad(likely, ((0, 0), (0, padding)), constant_values=-np.inf)
        peaks = likely.reshape(len(hidden), -1, tile).max(2)
        found: Int64 = np.sort(np.argsort(-peaks, 1)[:, : -(-candidates // tile)], 1)
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
        shapes = {"projection": (hidden_size, hidden_size), "deviations": (vocab_size,)}
        tensors = read_header(path)
        arrays = {}
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != "F32" or tensor.shape != shape:
                raise ModelFileError(
                    f"{path} is no screen of this model's head: {name} must be {list(shape)} numbers of F32."
                )
            array = tensor.read().view("<f4").astype(np.float32, copy=False).reshape(shape)
            if not np.isfinite(array).all() or (name == "deviations" and not (array > 0).all()):
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


def _signs(rest: Float32) -> Float32:
    """What of each row is kept: signs, and the scale that is best for all of them."""
    signs: Float32 = np.where(rest > 0, 1, -1) * np.abs(rest).mean(1, keepdims=True)
    return signs


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

"""A file of tensors, held open: reads of known ranges that never trust the length the file once had."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

import numpy as np

from fallow.arrays import Bytes
from fallow.errors import ModelFileError


class DataFile:
    """An open regular file. It is closed when nothing refers to it any more.

    Reads copy (``preadv``) instead of mapping: pages of a map count as the process's memory, and a map of a file that
    is cut short later kills the process with a signal instead of raising.
    Raises ``ModelFileError`` where the file cannot be opened or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not blocking, so that a named pipe cannot hold us up before we see that it is one.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelFileError(f"{path} cannot be opened: {reason}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a file: name a GGUF file or a model folder.")
        self.size = status.st_size

    def read(self, offset: int, count: int) -> Bytes:
        """``count`` bytes from ``offset``, uint8 ``[count]``; raises ``ModelFileError`` where they are not there."""
        assert offset >= 0
        assert count >= 0
        if offset + count > self.size:
            raise ModelFileError(f"{self.path} ends too early: it is cut short or damaged; fetch it again.")
        try:
            data = np.empty(count, np.uint8)
            view = data.data
            done = 0
            while done < count:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
                if got == 0:
                    raise ModelFileError(f"{self.path} was cut short while it was being read; fetch it again.")
                done += got
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror}.") from error
        except MemoryError as error:
            raise ModelFileError(f"{self.path} has a tensor of {count} bytes, for which memory is lacking.") from error
        return data

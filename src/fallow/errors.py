"""The errors a user can cause. Each carries one sentence: what was wrong, where, what to do."""

from __future__ import annotations


class FallowError(ValueError):
    """A mistake that the user can mend; the message is shown as it is, without a traceback."""


class ModelFileError(FallowError):
    """A model file or folder is missing, damaged, or of a kind that is not supported."""


class RequestError(FallowError):
    """A generation request that cannot be served as it was asked.

    ``param`` names the offending field of the request, in the words of the API.
    ``code`` is a short machine-readable reason, such as ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class OverloadedError(FallowError):
    """The queue is full or the engine is draining; the same request may succeed later."""

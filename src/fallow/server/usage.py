"""What every answer says about itself."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fallow.server.generation import Generation


def _version() -> str:
    try:
        return metadata.version("fallow")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "source"


VERSION = _version()
FINGERPRINT = f"fallow-{VERSION}"


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts over all prompts and choices of a request."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }

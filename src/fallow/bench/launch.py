"""Runs a worker module of this package in any Python, even one where fallow is not installed.

usage: python launch.py fallow.bench.workers.NAME [ARGUMENTS]

The environment of a peer has none of fallow's dependencies and must not see those of ours, which can be another
version of the same library. So ``fallow`` is made known as a bare package whose modules are found where they lie, and
nothing else of this installation is. What a worker imports from it uses the standard library only.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    package = types.ModuleType("fallow")
    package.__path__ = [str(here.parent)]
    sys.modules["fallow"] = package
    runpy.run_module(sys.argv.pop(1), run_name="__main__")


if __name__ == "__main__":
    main()

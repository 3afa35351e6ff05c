"""Requantises a GGUF file with llama.cpp (llama-cpp-python).   usage: IN.gguf OUT.gguf F32|BF16|Q8_0|... THREADS"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp  # type: ignore[import-not-found]


def requantize(source: str, target: str, kind: str, threads: int) -> int:
    """0 where it worked."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
    params.allow_requantize, params.nthread = True, threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(requantize(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))

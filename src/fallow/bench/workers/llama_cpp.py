"""llama.cpp as a worker: ``llama_decode`` itself, without the Python layers above it, and the likeliest token of each.

Flash attention, one KV cache for all sequences, batches of up to 2,048 tokens (512 at a time): the fastest settings
that were found for it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from fallow.bench.worker import Timeline, WorkerOptions, serve

_MAX_BATCH_TOKENS = 2048


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: object) -> None:
    pass


class LlamaCppBackend:
    """A GGUF file, in a context that holds ``max_positions`` tokens."""

    def __init__(self, options: WorkerOptions) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {options.model}")
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-options.max_positions // 256) * 256
        params.n_batch, params.n_ubatch = _MAX_BATCH_TOKENS, 512
        params.n_seq_max = options.max_batch
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type, params.kv_unified = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch: Any = llama_cpp.llama_batch_init(_MAX_BATCH_TOKENS, 0, 1)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        last = [0] * len(prompts)
        # All prompts in their order, in batches as large as they may be; a prompt's last token has logits.
        rows = [
            (token, position, i, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(rows), _MAX_BATCH_TOKENS):
            part = rows[start : start + _MAX_BATCH_TOKENS]
            self._decode(part)
            for row, (_, _, i, is_last) in enumerate(part):
                if is_last:
                    last[i] = int(self._logits(row).argmax())
                    timeline.arrived(i)
        for step in range(tokens - 1):
            self._decode([(last[i], len(prompt) + step, i, True) for i, prompt in enumerate(prompts)])
            for i in range(len(prompts)):
                last[i] = int(self._logits(i).argmax())
                timeline.arrived(i)

    def nll(self, tokens: list[int]) -> float:
        llama_cpp.llama_memory_clear(self.memory, True)
        total = 0.0
        for start in range(0, len(tokens) - 1, 512):
            part = tokens[start : min(start + 512, len(tokens) - 1)]
            self._decode([(token, start + row, 0, True) for row, token in enumerate(part)])
            for row in range(len(part)):
                logits = self._logits(row).astype(np.float64)
                top = logits.max()
                total += top + np.log(np.exp(logits - top).sum()) - logits[tokens[start + row + 1]]
        return float(total)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)  # waits for the computation
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))


if __name__ == "__main__":
    serve(LlamaCppBackend)

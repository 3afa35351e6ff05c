"""``transformers`` as a worker: a forward pass a step with its KV cache, and the likeliest token of each sequence.

In float32 it is also the reference of quality.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fallow.bench.worker import Timeline, WorkerOptions, serve


class TransformersBackend:
    """A Hugging Face folder in ``precision`` (``float32`` or ``bfloat16``), scaled-dot-product attention."""

    def __init__(self, options: WorkerOptions) -> None:
        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)
        dtype = getattr(torch, options.precision)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        self.vocab_size: int = self.model.config.vocab_size

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        inputs, cache = torch.tensor(prompts), None
        for _ in range(tokens):
            output = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            for sequence in range(len(prompts)):
                timeline.arrived(sequence)

    def nll(self, tokens: list[int]) -> float:
        ids = torch.tensor([tokens])
        logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        # The logarithm over a vocabulary is taken in double precision: a sum over many tokens is compared to 0.1%.
        scores = torch.cat([part.double().log_softmax(-1) for part in logits.split(128)])
        return -float(scores.gather(1, ids[0, 1:, None]).sum())


if __name__ == "__main__":
    serve(TransformersBackend)

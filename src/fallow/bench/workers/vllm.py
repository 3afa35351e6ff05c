"""vLLM's CPU build as a worker: its engine, one ``step`` after the other, as ``LLM.generate`` does, in bfloat16."""

from __future__ import annotations

import os
from functools import partial

from fallow.bench.worker import Timeline, WorkerOptions, serve


class VllmBackend:
    """A Hugging Face folder. No prefix cache, no detokenizing; a thread a core on all that it may use."""

    def __init__(self, options: WorkerOptions) -> None:
        # It would keep a core free for its own processes otherwise, and compute on the others.
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        # In whole GiB; the least where the memory of one sequence is asked for.
        if options.max_batch == 1:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # Imported here: vLLM reads the environment when it is imported.
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]  # noqa: PLC0415

        self.engine = LLM(
            options.model,
            dtype=options.precision,
            max_model_len=options.max_context,
            max_num_seqs=options.max_batch,
            enable_prefix_caching=False,
        ).llm_engine
        self.params = partial(
            SamplingParams, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.vocab_size: int = self.engine.model_config.get_vocab_size()
        self.requests = 0

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        sequences = {}
        for i, prompt in enumerate(prompts):
            name = f"{self.requests}"
            self.requests += 1
            sequences[name] = i
            self.engine.add_request(name, {"prompt_token_ids": prompt}, self.params(max_tokens=tokens))
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                for _ in output.outputs[0].token_ids:
                    timeline.arrived(sequences[output.request_id])

    def nll(self, tokens: list[int]) -> float:
        raise NotImplementedError("vLLM is not asked for log-probabilities")


if __name__ == "__main__":
    serve(VllmBackend)

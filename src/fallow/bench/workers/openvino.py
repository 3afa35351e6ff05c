"""OpenVINO GenAI as a worker: its continuous-batching pipeline, one ``step`` after the other, as ``generate`` does."""

from __future__ import annotations

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from fallow.bench.worker import Timeline, WorkerOptions, serve


class OpenVinoBackend:
    """An exported folder. Up to 4,096 tokens a step, no prefix cache, as many threads as asked for, latency hint."""

    def __init__(self, options: WorkerOptions) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        # A block holds 32 tokens; sequences do not share the last one.
        scheduler.num_kv_blocks = -(-options.max_positions // 32) + 2 * options.max_batch
        scheduler.max_num_seqs = options.max_batch
        scheduler.max_num_batched_tokens = 4096
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": options.threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self.vocab_size = len(self.pipeline.get_tokenizer().get_vocab())
        self.requests = 0

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.requests, ids, config))
            self.requests += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for _ in output.generated_ids:
                            timeline.arrived(i)

    def nll(self, tokens: list[int]) -> float:
        raise NotImplementedError("the pipeline gives no log-probabilities of a prompt")


if __name__ == "__main__":
    serve(OpenVinoBackend)

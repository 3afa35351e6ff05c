// A step of a program: every thread runs every operation on its share, with a barrier between two operations.
#include <algorithm>
#include <cstring>

#include "prefetch.h"
#include "program.h"

namespace fallow {
namespace {

constexpr size_t next_bytes = 32768;  // of a linear's weights, fetched while the operation before it ends
constexpr int column_rows = 64;       // beyond, rows lie too far apart to be walked down a column

}  // namespace

void Program::run(const Step& step, SampleArgs* sample) {
  step_ = step;
  sample_ = sample;
  if (sample != nullptr) {
    sample->logits = logits();
    sample->stride = logits_stride();
  }
  for (int s = 0; s < step.num_sequences; ++s) {
    for (int r = step.row_offsets[s]; r < step.row_offsets[s + 1]; ++r) {
      row_sequence_[r] = s;
      row_position_[r] = step.start_positions[s] + r - step.row_offsets[s];
    }
  }
  plan_attention(step);
  for (size_t i = 0; i <= operations_.size(); ++i) next_[i].store(0, std::memory_order_relaxed);
  pool_.run([](void* self, int thread) { static_cast<Program*>(self)->execute(thread); }, this);
}

void Program::execute(int thread) {
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (row_kind_[i] == 1 && step_.num_logit_rows == 0) break;
    std::visit([&](const auto& o) { execute(o, static_cast<int>(i), thread); }, operations_[i]);
    pool_.barrier();
  }
  if (sample_ == nullptr) return;
  std::atomic<int>& next = next_[operations_.size()];
  for (int r = 0; (r = next.fetch_add(1, std::memory_order_relaxed)) < step_.num_logit_rows;) sample_row(*sample_, r, scratch_[thread].sample);
}

void Program::log_probabilities(const int32_t* targets, int count, float* out) {
  struct Task {
    Program* program;
    const int32_t* targets;
    int count;
    float* out;
  } task{this, targets, count, out};
  pool_.run(
      [](void* context, int thread) {
        const Task& t = *static_cast<Task*>(context);
        for (int r = thread; r < t.count; r += t.program->pool_.size()) {
          t.out[r] = log_probability(t.program->logits() + r * t.program->logits_stride(), t.program->vocab_size(), t.targets[r]);
        }
      },
      &task);
}

void Program::execute(const op::Embed& o, int index, int thread) {
  const PackedLinear& w = *weights_[o.weights];
  for_rows(index, thread, [&](int r) {
    float* out = row(o.out, r);
    unpack_row(w, step_.tokens[r], out);
    if (o.scale != 1.f) {
      for (int i = 0; i < w.in_features; ++i) out[i] *= o.scale;
    }
  });
}

void Program::execute(const op::Norm& o, int index, int thread) {
  for_rows(index, thread, [&](int r) {
    kernels_.rms_norm({row(o.x, r), vectors_[o.weight].data(), o.eps, buffers_[o.x].width}, row(o.out, r));
  });
}

void Program::execute(const op::NormQuantise& o, int index, int thread) {
  auto* normed = scratch_[thread].row.as<float>();
  const int width = buffers_[o.x].width;
  std::vector<int64_t> sums(totals_.empty() ? 0 : width);
  for_rows(index, thread, [&](int r) {
    // Half of a row was written by another core.
    prefetch_near(row(o.x, r + 1), width * sizeof(float));
    const float* shift = o.centre < 0 ? nullptr : vectors_[o.centre].data();
    kernels_.rms_norm({row(o.x, r), vectors_[o.weight].data(), o.eps, width, shift}, normed);
    if (!sums.empty()) add_to_sums(r, normed, sums);
    for (const int a : o.out) kernels_.quantise(normed, activations_[a].format, activation_row(a, r), 0, activations_[a].format.groups());
  });
  if (!sums.empty()) add_to_totals(index, sums);
}

void Program::execute(const op::Quantise& o, int index, int thread) {
  const ActivationFormat& f = activations_[o.out].format;
  if (rows(index) > column_rows) {
    for_rows(index, thread, [&](int r) {
      prefetch_near(row(o.x, r + 1), f.in_features * sizeof(float));
      kernels_.quantise(row(o.x, r), f, activation_row(o.out, r), 0, f.groups());
    });
    return;
  }
  // By columns, as the linear before wrote them: what a thread reads is in its own cache.
  const int64_t threads = pool_.size();
  const int begin = static_cast<int>(f.groups() * int64_t{thread} / threads);
  const int end = static_cast<int>(f.groups() * (int64_t{thread} + 1) / threads);
  for (int r = 0; r < rows(index); ++r) kernels_.quantise(row(o.x, r), f, activation_row(o.out, r), begin, end);
}

void Program::execute(const op::Linear& o, int index, int thread) {
  const PackedLinear& w = *weights_[o.weights];
  const Activations& a = activations_[o.activations];
  const LinearTask task{&w,
                        a.format,
                        a.memory.data(),
                        rows(index),
                        row(o.out, 0) + o.column,
                        buffers_[o.out].stride,
                        o.bias < 0 ? nullptr : vectors_[o.bias].data(),
                        o.epilogue};
  uint8_t* scratch = scratch_[thread].linear.data();
  const auto share = [&](const PackedLinear& m, int t) { return 2 * static_cast<int>((m.tiles + 1) / 2 * int64_t{t} / pool_.size()); };
  const int begin = share(w, thread);
  const int end = share(w, thread + 1);
  kernels_.linear(task, begin, end, scratch);
  // While the others finish, the start of this thread's next weights comes.
  const int next = next_linear_[index];
  if (next < 0) return;
  const PackedLinear& after = *weights_[next];
  const uint8_t* p = after.tile(share(after, thread));
  const uint8_t* last = after.data + after.bytes;
  for (size_t line = 0; line < next_bytes && p + line < last; line += cache_line) prefetch_far(p + line);
}

void Program::execute(const op::Rope& o, int index, int thread) {
  const size_t stride = static_cast<size_t>(layout_.num_heads) * layout_.padded_dim();
  const auto norm = [&](int v) { return v < 0 ? nullptr : vectors_[v].data(); };
  for_rows(index, thread, [&](int r) {
    const auto page_of = [&](int i) {
      return page(o.layer, step_.page_table[static_cast<size_t>(row_sequence_[i]) * step_.table_width + row_position_[i] / page_size]);
    };
    const int next = std::min(r + 1, rows(index) - 1);
    kernels_.rope({layout_, row_position_[r], vectors_[o.table].data(), o.rotary_dim, norm(o.q_norm), norm(o.k_norm), o.eps, row(o.qkv, r),
                   queries_.as<uint16_t>() + r * stride, page_of(r), page_of(next), row_position_[next]});
  });
}

void Program::execute(const op::Add& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { kernels_.add(row(o.x, r), row(o.out, r), buffers_[o.x].width); });
}

void Program::execute(const op::Gate& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { kernels_.gate(row(o.gate, r), row(o.up, r), row(o.out, r), buffers_[o.gate].width, o.gelu); });
}

void Program::execute(const op::Gather& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { std::memcpy(row(o.out, r), row(o.x, step_.logit_rows[r]), sizeof(float) * buffers_[o.x].width); });
}

}  // namespace fallow

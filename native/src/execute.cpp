// A step of a program. With few rows every thread runs every operation on its share, with a barrier between two
// operations. Where there are enough for a register tile each, a thread takes its own through all operations up to the
// next attention: what it writes it reads again from its own cache, and weights come once from memory, then from the
// last-level cache. No bit of a result depends on who computes it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "prefetch.h"
#include "program.h"

namespace fallow {
namespace {

constexpr size_t next_bytes = 32768;  // of a linear's weights, fetched while the operation before it ends
constexpr int own_rows = 6;           // a thread has at least so many of its own: a register tile of AVX-512

}  // namespace

void Program::run(const Step& step, SampleArgs* sample, const Record& record) {
  step_ = step;
  sample_ = sample;
  record_ = record;
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
  if (chooses_pages_) list_full_pages();
  list_pages_ahead();
  begin_head();
  for (size_t i = 0; i <= operations_.size(); ++i) next_[i].store(0, std::memory_order_relaxed);
  pool_.run([](void* self, int thread) { static_cast<Program*>(self)->execute(thread); }, this);
  count_head_rows();
}

void Program::execute(int thread) {
  const int count = totals_.empty() ? static_cast<int>(operations_.size()) : last_centred_ + 1;
  const auto run = [&](int i, const Part& part) {
    std::visit([&](const auto& o) { execute(o, i, thread, part); }, operations_[i]);
  };
  for (int i = 0; i < count;) {
    if (row_kind_[i] == 1 && step_.num_logit_rows == 0) break;
    if (run_end_[i] > i && rows(i) >= own_rows * pool_.size()) {
      const int end = std::min(run_end_[i], count);
      const int first = pool_.share(rows(i), thread);
      const int mine = pool_.share(rows(i), thread + 1) - first;
      const int blocks = (mine + block_rows - 1) / block_rows;
      for (int b = 0; b < blocks; ++b) {
        const int begin = first + mine * b / blocks;
        const Part block{begin, first + mine * (b + 1) / blocks, 0, 1, begin - std::min(first, thread * block_rows)};
        for (int k = i; k < end; ++k) run(k, block);
      }
      i = end;
    } else {
      run(i, part_of(i, thread));
      ++i;
    }
    pool_.barrier();
  }
  sample_rows(thread);
}

// Columns are shared out where an operation is about them, else rows.
Program::Part Program::part_of(int index, int thread) const {
  const int n = rows(index);
  const bool by_columns = std::holds_alternative<op::Linear>(operations_[index]) ||
                          std::holds_alternative<op::Quantise>(operations_[index]) ||
                          std::holds_alternative<op::SoftCap>(operations_[index]) ||
                          std::holds_alternative<op::Neurons>(operations_[index]) ||
                          std::holds_alternative<op::Spread>(operations_[index]) ||
                          std::holds_alternative<op::Screen>(operations_[index]) ||
                          std::holds_alternative<op::SecondLook>(operations_[index]) ||
                          std::holds_alternative<op::Rescore>(operations_[index]);
  if (by_columns) return {0, n, thread, pool_.size(), 0};
  return {pool_.share(n, thread), pool_.share(n, thread + 1), 0, 1, 0};
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

void Program::execute(const op::Embed& o, int, int thread, const Part& part) {
  const PackedLinear& w = *weights_[o.weights];
  for (int r = part.begin; r < part.end; ++r) {
    float* out = row(o.out, r, part) + o.column;
    float* values = o.add ? scratch_[thread].row.as<float>() : out;
    unpack_row(w, step_.tokens[r], values);
    if (o.scale != 1.f) {
      for (int i = 0; i < w.in_features; ++i) values[i] *= o.scale;
    }
    if (o.add) kernels_.add(values, out, w.in_features);
  }
}

void Program::execute(const op::Norm& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) {
    kernels_.rms_norm({row(o.x, r, part), vectors_[o.weight].data(), o.eps, buffers_[o.x].width}, row(o.out, r, part));
  }
}

void Program::execute(const op::NormQuantise& o, int index, int thread, const Part& part) {
  auto* normed = scratch_[thread].row.as<float>();
  const int width = buffers_[o.x].width;
  const size_t summed = totals_.empty() ? 0 : width;
  Sums sums{std::vector<int64_t>(summed), std::vector<int64_t>(summed)};
  fetching_ahead(o.x, 0, width, part, [&](int r) {
    const int centre = o.first_centre >= 0 && position(index, r) == 0 ? o.first_centre : o.centre;
    const float* shift = centre < 0 ? nullptr : vectors_[centre].data();
    kernels_.rms_norm({row(o.x, r, part), vectors_[o.weight].data(), o.eps, width, shift}, normed);
    if (o.kept >= 0) kernels_.rms_norm({row(o.x, r, part), vectors_[o.weight].data(), o.eps, width}, row(o.kept, r, part));
    if (summed > 0) add_to_sums(position(index, r), normed, sums);
    for (const int a : o.out) kernels_.quantise(normed, activations_[a].format, activation_row(a, r, part), 0, activations_[a].format.groups());
  });
  if (summed > 0) add_to_totals(index, sums);
}

void Program::execute(const op::Quantise& o, int index, int, const Part& part) {
  const ActivationFormat& f = activations_[o.out].format;
  // By columns a thread reads what it wrote in the linear before.
  const int begin = part.first_of(f.groups());
  const int end = part.end_of(f.groups());
  const int width = f.in_features / f.groups();
  fetching_ahead(o.x, begin * width, (end - begin) * width, part, [&](int r) {
    if (resting(o.threshold) > 0.f) kernels_.zero_within(row(o.x, r, part) + begin * width, (end - begin) * width, o.threshold);
    kernels_.quantise(row(o.x, r, part), f, activation_row(o.out, r, part), begin, end);
  });
  if (!o.recorded || record_.inputs == nullptr || begin == end) return;
  record_bits(input_bits(), o.x, f.in_features, 0.f, index, part, begin * width / 8, (end * width + 7) / 8);
}

void Program::execute(const op::Linear& o, int index, int thread, const Part& part) {
  const PackedLinear& w = *weights_[o.weights];
  const Activations& a = activations_[o.activations];
  const LinearTask task{&w,
                        a.format,
                        activation_row(o.activations, part.begin, part),
                        part.end - part.begin,
                        row(o.out, part.begin, part) + o.column,
                        buffers_[o.out].stride,
                        o.bias < 0 ? nullptr : vectors_[o.bias].data(),
                        o.epilogue,
                        pages_ahead(index, thread),
                        nullptr,
                        o.gates < 0 ? nullptr : row(o.gates, part.begin, part),
                        o.gates < 0 ? 0 : buffers_[o.gates].stride,
                        o.activation,
                        resting(o.threshold)};
  const int unit = w.layout == Layout::columns ? block_tiles : 2;
  const int units = (w.tiles + unit - 1) / unit;
  const int begin = unit * part.first_of(units);
  const int end = unit * part.end_of(units);
  (w.layout == Layout::tiles ? kernels_.linear : kernels_.sparse_linear)(task, begin, end, scratch_[thread].linear.data());
  if (o.gates >= 0 && record_.neurons != nullptr) {
    const int bytes = w.out_features / 8;
    record_bits(neuron_bits(), o.out, w.out_features, 0.f, index, part, std::min(begin * lanes / 8, bytes), std::min(end * lanes / 8, bytes));
  }
  for (int r = part.begin; o.first_bias >= 0 && r < part.end; ++r) {
    if (position(index, r) != 0) continue;
    const int first = begin * lanes;
    kernels_.add(vectors_[o.first_bias].data() + first, row(o.out, r, part) + o.column + first, std::min(end * lanes, w.out_features) - first);
  }
  // While the others finish, the start of this thread's next weights comes.
  const int next = next_linear_[index];
  if (next < 0) return;
  const PackedLinear& after = *weights_[next];
  const uint8_t* p = after.first_of(2 * part.first_of((after.tiles + 1) / 2));
  const uint8_t* last = after.data + after.bytes;
  for (size_t line = 0; line < next_bytes && p + line < last; line += cache_line) prefetch_far(p + line);
}

void Program::execute(const op::Rope& o, int, int, const Part& part) {
  const KvLayout heads = layout(o.kv_heads);
  const size_t stride = static_cast<size_t>(heads.num_heads) * heads.padded_dim();
  const auto norm = [&](int v) { return v < 0 ? nullptr : vectors_[v].data(); };
  fetching_ahead(o.qkv, 0, buffers_[o.qkv].width, part, [&](int r) {
    const auto page_of = [&](int i) {
      return page(o.layer, step_.page_table[static_cast<size_t>(row_sequence_[i]) * step_.table_width + row_position_[i] / page_size]);
    };
    const int next = std::min(r + 1, part.end - 1);
    kernels_.rope({heads, row_position_[r], vectors_[o.table].data(), o.rotary_dim, norm(o.q_norm), norm(o.k_norm), o.eps, row(o.qkv, r, part),
                   queries_.as<uint16_t>() + r * stride, page_of(r), page_of(next), row_position_[next]});
  });
}

void Program::execute(const op::Add& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) kernels_.add(row(o.x, r, part), row(o.out, r, part), buffers_[o.x].width);
}

void Program::execute(const op::Gate& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) {
    kernels_.gate(row(o.gate, r, part), row(o.up, r, part), row(o.out, r, part), buffers_[o.gate].width, o.activation);
  }
}

void Program::execute(const op::Mix& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) {
    kernels_.mix(row(o.x, r, part), o.keep, row(o.first, r, part), o.again, row(o.out, r, part), buffers_[o.x].width);
  }
}

void Program::execute(const op::SoftCap& o, int, int, const Part& part) {
  // By columns a thread changes what it wrote in the linear before.
  constexpr int pair = 2 * lanes;
  const int width = buffers_[o.x].width;
  const int pairs = (width + pair - 1) / pair;
  const int begin = part.first_of(pairs) * pair;
  const int end = std::min(part.end_of(pairs) * pair, width);
  for (int r = part.begin; r < part.end; ++r) kernels_.soft_cap(row(o.x, r, part) + begin, end - begin, o.cap);
}

void Program::execute(const op::AboveThreshold& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) kernels_.above_threshold(row(o.x, r, part), buffers_[o.x].width, o.quantile);
}

void Program::execute(const op::KeepLargest& o, int, int thread, const Part& part) {
  auto* scratch = scratch_[thread].row.as<float>();
  for (int r = part.begin; r < part.end; ++r) kernels_.keep_largest(row(o.x, r, part), buffers_[o.x].width, o.count, o.activation, scratch);
}

void Program::execute(const op::Neurons& o, int, int thread, const Part& part) {
  const PackedNeurons& w = *neurons_[o.neurons];
  const int blocks = (w.count + lanes - 1) / lanes;
  const NeuronTask task{&w,          part.end - part.begin, row(o.x, part.begin, part), buffers_[o.x].stride, row(o.gates, part.begin, part),
                        buffers_[o.gates].stride, o.activation, o.threshold, scratch_[thread].norms.data()};
  kernels_.neurons(task, part.first_of(blocks) * lanes, std::min(part.end_of(blocks) * lanes, w.count));
}

void Program::execute(const op::Spread& o, int index, int, const Part& part) {
  const PackedNeurons& w = *neurons_[o.neurons];
  const int blocks = w.in_features / lanes;
  const SpreadTask task{&w, part.end - part.begin, row(o.x, part.begin, part), buffers_[o.x].stride, resting(o.threshold),
                        row(o.out, part.begin, part), buffers_[o.out].stride};
  kernels_.spread(task, part.first_of(blocks) * lanes, part.end_of(blocks) * lanes);
  const int bytes = (w.count + 7) / 8;
  if (record_.neurons == nullptr) return;
  record_bits(neuron_bits(), o.x, w.count, resting(o.threshold), index, part, part.first_of(bytes), part.end_of(bytes));
}

// Of the bytes [begin, end) of bits: those whose values are beyond the threshold, as the kernel asks of each, too; a value that
// is no number is.
void Program::record_bits(const Bits& to, int buffer, int count, float threshold, int index, const Part& part, int begin, int end) const {
  for (int r = part.begin; r < part.end; ++r) {
    const size_t token = row_kind_[index] == 1 ? step_.logit_rows[r] : r;
    uint8_t* out = to.first + (token * to.places + record_place_[index]) * to.bytes;
    const float* values = row(buffer, r, part);
    for (int b = begin; b < end; ++b) {
      unsigned bits = 0;  // without a branch for each of them
      for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(!(std::fabs(values[8 * b + i]) <= threshold)) << i;
      out[b] = static_cast<uint8_t>(b == count / 8 ? bits & ((1u << count % 8) - 1) : bits);
    }
  }
}

void Program::execute(const op::Gather& o, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) std::memcpy(row(o.out, r, part), row(o.x, step_.logit_rows[r], part), sizeof(float) * buffers_[o.x].width);
}

}  // namespace fallow

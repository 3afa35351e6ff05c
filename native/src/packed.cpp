#include "packed.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bits.h"
#include "pool.h"

namespace fallow {
namespace {

struct Storage {
  const char* name;
  int block, bytes;     // elements and bytes of a block
  Codes codes;          // what it is packed into in its own precision
  int group;
  Scales scales;
  bool offsets;
};

constexpr std::array<Storage, 11> storages{{
    {"F32", 1, 4, Codes::bf16, 0, Scales::none, false},
    {"F16", 1, 2, Codes::bf16, 0, Scales::none, false},
    {"BF16", 1, 2, Codes::bf16, 0, Scales::none, false},
    {"Q4_0", 32, 18, Codes::q4, 32, Scales::f16, false},
    {"Q4_1", 32, 20, Codes::q4, 32, Scales::f16, true},
    {"Q5_0", 32, 22, Codes::q8, 32, Scales::f16, false},
    {"Q5_1", 32, 24, Codes::q8, 32, Scales::f16, true},
    {"Q8_0", 32, 34, Codes::q8, 32, Scales::f16, false},
    {"Q4_K", 256, 144, Codes::q4, 32, Scales::f32, true},
    {"Q5_K", 256, 176, Codes::q8, 32, Scales::f32, true},
    {"Q6_K", 256, 210, Codes::q8, 16, Scales::f32, false},
}};

const Storage& storage_of(const std::string& name) {
  for (const auto& s : storages) {
    if (name == s.name) return s;
  }
  throw std::invalid_argument("tensor type " + name + " is not supported");
}

uint16_t read16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}
uint32_t read32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// The 6-bit scale and minimum of sub-block j of a K-quant, packed in 12 bytes.
void k_scale_min(const uint8_t* s, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = s[j] & 63;
    minimum = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
    minimum = (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
  }
}

// Formats: GGUF block layouts as documented by the gguf format; see the dequantisation reference in Python.
void code_row(const Storage& s, const uint8_t* p, int n, CodedRow& row) {
  const std::string name = s.name;
  const bool four = name == "Q4_0" || name == "Q4_1";
  const bool five = name == "Q5_0" || name == "Q5_1";
  const bool eight = name == "Q8_0";
  const bool k_four_or_five = name == "Q4_K" || name == "Q5_K";
  row.codes.assign(n, 0);
  const int groups = n / s.group;
  row.scales.assign(groups, 0.f);
  row.offsets.assign(groups, 0.f);
  for (int b = 0; b < n / s.block; ++b, p += s.bytes) {
    uint8_t* c = row.codes.data() + b * s.block;
    float* scale = row.scales.data() + b * s.block / s.group;
    float* offset = row.offsets.data() + b * s.block / s.group;
    if (four) {
      const uint8_t* q = p + s.bytes - 16;
      for (int i = 0; i < 16; ++i) {
        c[i] = q[i] & 15;
        c[i + 16] = q[i] >> 4;
      }
      scale[0] = f16_to_float(read16(p));
      if (s.offsets) offset[0] = f16_to_float(read16(p + 2)) + 8.f * scale[0];
    } else if (five) {
      const uint8_t* q = p + s.bytes - 16;
      const uint32_t high = read32(q - 4);
      for (int i = 0; i < 16; ++i) {
        c[i] = static_cast<uint8_t>(((q[i] & 15) | (((high >> i) & 1u) << 4)) + 112);
        c[i + 16] = static_cast<uint8_t>(((q[i] >> 4) | (((high >> (i + 16)) & 1u) << 4)) + 112);
      }
      scale[0] = f16_to_float(read16(p));
      if (s.offsets) offset[0] = f16_to_float(read16(p + 2)) + 16.f * scale[0];
    } else if (eight) {
      for (int i = 0; i < 32; ++i) c[i] = static_cast<uint8_t>(p[2 + i] + 128);
      scale[0] = f16_to_float(read16(p));
    } else if (k_four_or_five) {
      const float d = f16_to_float(read16(p));
      const float dmin = f16_to_float(read16(p + 2));
      const bool has_fifth = s.codes == Codes::q8;
      const uint8_t* high = p + 16;
      const uint8_t* q = p + 16 + (has_fifth ? 32 : 0);
      const int centre = has_fifth ? 16 : 8;
      for (int j = 0; j < 8; ++j) {
        int sc = 0;
        int mn = 0;
        k_scale_min(p + 4, j, sc, mn);
        scale[j] = d * static_cast<float>(sc);
        offset[j] = static_cast<float>(centre) * scale[j] - dmin * static_cast<float>(mn);
        for (int i = 0; i < 32; ++i) {
          const uint8_t byte = q[(j / 2) * 32 + i];
          int code = (j % 2 == 0) ? (byte & 15) : (byte >> 4);
          if (has_fifth) code += ((high[i] >> j) & 1) * 16 + 112;
          c[j * 32 + i] = static_cast<uint8_t>(code);
        }
      }
    } else {  // Q6_K
      const uint8_t* low = p;
      const uint8_t* high = p + 128;
      const auto* sc = reinterpret_cast<const int8_t*>(p + 192);
      const float d = f16_to_float(read16(p + 208));
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 32; ++i) {
          const int h = high[half * 32 + i];
          const int a = low[half * 64 + i];
          const int e = low[half * 64 + 32 + i];
          uint8_t* o = c + half * 128 + i;
          o[0] = static_cast<uint8_t>(((a & 15) | ((h & 3) << 4)) + 96);
          o[32] = static_cast<uint8_t>(((e & 15) | (((h >> 2) & 3) << 4)) + 96);
          o[64] = static_cast<uint8_t>(((a >> 4) | (((h >> 4) & 3) << 4)) + 96);
          o[96] = static_cast<uint8_t>(((e >> 4) | (((h >> 6) & 3) << 4)) + 96);
        }
      }
      for (int j = 0; j < 16; ++j) scale[j] = d * static_cast<float>(sc[j]);
    }
  }
}

float element(const std::string& name, const uint8_t* p, int i) {
  if (name == "F32") return bits_to_float(read32(p + 4 * static_cast<size_t>(i)));
  const uint16_t h = read16(p + 2 * static_cast<size_t>(i));
  return name == "F16" ? f16_to_float(h) : bf16_to_float(h);
}

// Float values of a row of any storage type.
void decode_row(const Storage& s, const uint8_t* p, int n, CodedRow& coded, std::vector<float>& out) {
  out.resize(n);
  if (s.codes == Codes::bf16) {
    for (int i = 0; i < n; ++i) out[i] = element(s.name, p, i);
    return;
  }
  code_row(s, p, n, coded);
  const int zero = s.codes == Codes::q4 ? 8 : 128;
  for (int i = 0; i < n; ++i) {
    const int g = i / s.group;
    out[i] = coded.scales[g] * static_cast<float>(coded.codes[i] - zero) + coded.offsets[g];
  }
}

// Throws where a source does not hold `rows` rows of whole blocks.
void check_size(const RowSource& source, const Storage& s, int in_features) {
  if (in_features % s.block != 0) {
    throw std::invalid_argument(source.type + " needs columns in multiples of " + std::to_string(s.block) + ", not " +
                                std::to_string(in_features));
  }
  if (source.rows <= 0 || source.bytes / s.bytes / (static_cast<size_t>(in_features) / s.block) < static_cast<size_t>(source.rows)) {
    throw std::invalid_argument("a tensor has fewer bytes than its shape needs");
  }
}

size_t align64(size_t n) { return (n + 63) / 64 * 64; }

// Where a quantised row of the weights keeps what, in any layout.
struct Place {
  const PackedLinear& w;
  uint8_t* unit;
  int tile, lane;  // of a block, of a tile

  Place(const PackedLinear& w, int row)
      : w(w),
        unit(w.unit(w.layout == Layout::tiles ? row / lanes : (w.layout == Layout::rows ? row : row / lanes / block_tiles))),
        tile(w.layout == Layout::columns ? row / lanes % block_tiles : 0),
        lane(w.layout == Layout::rows ? 0 : row % lanes) {}

  uint8_t* quad_byte(int k) const { return unit + static_cast<size_t>(k / 4) * 64 + lane * 4 + k % 4; }  // 8-bit codes in tiles
  // The byte of a 4-bit code, and whether it is the high half.
  uint8_t* byte(int k) const {
    const int g = k / 32;
    const int i = k % 16;
    if (w.layout == Layout::rows) return unit + g * 16 + i;
    if (w.layout == Layout::columns) return unit + w.unit_codes_at + static_cast<size_t>(k) * 64 + lane / 4 * 16 + tile / 2 * 4 + lane % 4;
    return unit + g * 256 + i / 4 * 64 + lane * 4 + i % 4;
  }
  bool is_high(int k) const { return w.layout == Layout::columns ? tile % 2 == 1 : k % 32 >= 16; }
  // The scale of group `i`, or pair `i`, among those of the row.
  size_t number(int i) const {
    if (w.layout == Layout::rows) return i;
    return (static_cast<size_t>(i) * (w.layout == Layout::columns ? block_tiles : 1) + tile) * lanes + lane;
  }
  float& f32_scale(int g) const { return reinterpret_cast<float*>(unit + w.unit_scales_at)[number(g)]; }
  uint16_t& f16_scale(int g) const { return reinterpret_cast<uint16_t*>(unit + w.unit_scales_at)[number(g)]; }
  uint16_t* pair(int p) const { return reinterpret_cast<uint16_t*>(unit + w.unit_pairs_at) + number(p) * 2; }

  int code(int k) const {
    if (w.codes == Codes::q8) return *quad_byte(k);
    return is_high(k) ? *byte(k) >> 4 : *byte(k) & 15;
  }
  void put_codes(const uint8_t* codes) const {
    if (w.codes == Codes::q8) {
      for (int k = 0; k < w.in_features; k += 4) std::memcpy(quad_byte(k), codes + k, 4);
    } else if (w.layout == Layout::columns) {
      uint8_t* out = byte(0);
      const int shift = is_high(0) ? 4 : 0;
      for (int k = 0; k < w.in_features; ++k, out += 64) *out = static_cast<uint8_t>(*out | codes[k] << shift);  // memory comes zeroed
    } else {
      for (int k = 0; k < w.in_features; k += k % 32 == 12 ? 20 : 4) {
        uint8_t* out = byte(k);
        for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(codes[k + i] | codes[k + 16 + i] << 4);
      }
    }
  }
};

void put_row(const PackedLinear& w, int row, const CodedRow& coded) {
  const Place place(w, row);
  place.put_codes(coded.codes.data());
  for (int g = 0; g < w.groups; ++g) {
    if (w.scales == Scales::f32) place.f32_scale(g) = coded.scales[g];
    float sum = 0.f;
    if (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both) {
      int total = 0;
      for (int i = 0; i < w.group; ++i) total += coded.codes[g * w.group + i] - w.zero();
      sum = coded.scales[g] * static_cast<float>(total) + coded.offsets[g] * static_cast<float>(w.group);
    }
    if (w.pairs_kind == Pairs::offsets) place.pair(g / 2)[g % 2] = float_to_bf16(coded.offsets[g]);
    if (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both) {
      uint16_t* slot = place.pair(w.pairs_kind == Pairs::both ? 2 * g : g);
      slot[0] = float_to_bf16(sum);
      slot[1] = float_to_bf16(sum - bf16_to_float(slot[0]));
    }
    if (w.pairs_kind == Pairs::both) place.pair(2 * g + 1)[0] = float_to_bf16(coded.offsets[g]);
  }
}

// The float16 scales are kept as they are in the file: the bits are copied, not converted back.
void put_f16_scales(const PackedLinear& w, int row, const Storage& s, const uint8_t* p) {
  const Place place(w, row);
  for (int g = 0; g < w.groups; ++g) place.f16_scale(g) = read16(p + static_cast<size_t>(g) * s.bytes);
}

PackedLinear layout(const Storage& s, int rows, int in_features, const PackOptions& options) {
  PackedLinear w;
  w.out_features = rows;
  w.in_features = in_features;
  w.tiles = (rows + lanes - 1) / lanes;
  const bool q8 = options.precision == "q8";
  w.codes = options.precision == "bf16" ? Codes::bf16 : (q8 ? Codes::q8 : s.codes);
  size_t codes_bytes = 0;
  if (w.codes == Codes::bf16) {
    codes_bytes = static_cast<size_t>((in_features + 1) / 2) * lanes * 4;
  } else {
    w.group = q8 ? 32 : s.group;
    w.groups = in_features / w.group;
    w.scales = q8 ? Scales::f32 : s.scales;
    const bool offsets = q8 || s.offsets;
    w.pairs_kind = offsets ? (options.asymmetric ? Pairs::both : Pairs::offsets)
                           : (options.asymmetric ? Pairs::sums : Pairs::none);
    w.pairs = pair_count(w.pairs_kind, w.groups);
    codes_bytes = static_cast<size_t>(in_features) * lanes * static_cast<int>(w.codes) / 8;
  }
  w.scales_at = align64(codes_bytes);
  const size_t scale_bytes = static_cast<size_t>(w.groups) * lanes * (w.scales == Scales::f16 ? 2 : 4);
  w.pairs_at = w.scales_at + align64(scale_bytes);
  w.tile_bytes = w.pairs_at + static_cast<size_t>(w.pairs) * lanes * 4;
  w.layout = options.layout;
  size_t units = 0;
  if (w.layout == Layout::tiles) {
    w.unit_scales_at = w.scales_at;
    w.unit_pairs_at = w.pairs_at;
    w.unit_bytes = w.tile_bytes;
    units = static_cast<size_t>(w.tiles + w.tiles % 2);  // kernels read two at a time: an odd count gets one more, all zero
  } else if (w.layout == Layout::rows) {
    const auto align16 = [](size_t n) { return (n + 15) / 16 * 16; };
    w.unit_scales_at = static_cast<size_t>(in_features) / 2;
    w.unit_pairs_at = w.unit_scales_at + align16(scale_bytes / lanes);
    w.unit_bytes = align64(w.unit_pairs_at + align16(static_cast<size_t>(w.pairs) * 4));
    units = static_cast<size_t>(rows);
  } else {
    w.unit_scales_at = static_cast<size_t>(w.pairs) * lanes * block_tiles * 4;
    w.unit_codes_at = w.unit_scales_at + align64(scale_bytes * block_tiles);
    w.unit_bytes = w.unit_codes_at + static_cast<size_t>(in_features) * 64;
    units = static_cast<size_t>(w.blocks());
  }
  w.bytes = units * w.unit_bytes;
  w.memory = Memory(w.bytes);
  w.data = w.memory.data();
  return w;
}

}  // namespace

void code_row_q8(const float* values, int n, int group, CodedRow& row) {
  row.codes.resize(n);
  row.scales.resize(n / group);
  row.offsets.resize(n / group);
  for (int g = 0; g < n / group; ++g) {
    const float* v = values + g * group;
    const auto [low, high] = std::minmax_element(v, v + group);
    const float scale = (*high - *low) / 255.f;
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
    for (int i = 0; i < group; ++i) {
      const float code = (v[i] - *low) * inverse;
      row.codes[g * group + i] = static_cast<uint8_t>(code > 0.f ? std::min(code, 255.f) + 0.5f : 0.f);
    }
    row.scales[g] = scale;
    row.offsets[g] = *low + 128.f * scale;
  }
}

std::vector<float> values_of(const RowSource& source, int in_features) {
  const Storage& s = storage_of(source.type);
  if (in_features <= 0) throw std::invalid_argument("a linear layer needs rows and columns");
  check_size(source, s, in_features);
  std::vector<float> values(static_cast<size_t>(source.rows) * in_features);
  CodedRow coded;
  std::vector<float> row;
  for (int r = 0; r < source.rows; ++r) {
    decode_row(s, source.data + static_cast<size_t>(r) * (in_features / s.block) * s.bytes, in_features, coded, row);
    std::copy(row.begin(), row.end(), values.begin() + static_cast<size_t>(r) * in_features);
  }
  return values;
}

namespace {

// Rows [begin, end) of the packed weights out of their sources.
void pack_rows(const PackedLinear& w, const std::vector<RowSource>& sources, const PackOptions& options, int begin, int end) {
  CodedRow coded;
  std::vector<float> values;
  int base = 0;
  for (size_t n = 0; n < sources.size(); ++n) {
    const RowSource& source = sources[n];
    const Storage& from = storage_of(source.type);
    const bool is_kept = source.type == "BF16";
    const size_t row_bytes = static_cast<size_t>(w.in_features) / from.block * from.bytes;
    for (int r = 0; r < source.rows; ++r) {
      const int row = options.interleave ? (r / lanes * 2 + static_cast<int>(n)) * lanes + r % lanes : base + r;
      if (row < begin || row >= end) continue;
      const uint8_t* p = source.data + r * row_bytes;
      if (w.codes == Codes::bf16) {
        decode_row(from, p, w.in_features, coded, values);
        const int lane = row % lanes;
        auto* out = reinterpret_cast<uint16_t*>(w.tile(row / lanes));
        for (int k = 0; k < w.in_features; ++k) {
          out[(static_cast<size_t>(k / 2) * lanes + lane) * 2 + k % 2] = is_kept ? read16(p + 2 * static_cast<size_t>(k)) : float_to_bf16(values[k]);
        }
      } else if (options.precision == "q8") {
        decode_row(from, p, w.in_features, coded, values);
        code_row_q8(values.data(), w.in_features, w.group, coded);
        put_row(w, row, coded);
      } else {
        code_row(from, p, w.in_features, coded);
        put_row(w, row, coded);
        if (w.scales == Scales::f16) put_f16_scales(w, row, from, p);
      }
    }
    base += source.rows;
  }
}

}  // namespace

PackedLinear pack_linear(const std::vector<RowSource>& sources, int in_features, const PackOptions& options, ThreadPool& pool) {
  if (sources.empty() || in_features <= 0) throw std::invalid_argument("a linear layer needs rows and columns");
  const Storage& s = storage_of(sources[0].type);
  const bool own = options.precision == "own";
  if (!own && options.precision != "q8" && options.precision != "bf16") {
    throw std::invalid_argument("precision " + options.precision + " is not known: own, q8 or bf16");
  }
  int rows = 0;
  for (const auto& source : sources) {
    const Storage& other = storage_of(source.type);
    if (own && &other != &s) throw std::invalid_argument("tensors of different types cannot be packed together");
    check_size(source, other, in_features);
    rows += source.rows;
  }
  if (options.precision == "q8" && in_features % 32 != 0) {
    throw std::invalid_argument("q8 needs columns in multiples of 32, not " + std::to_string(in_features));
  }
  if (options.interleave && (sources.size() != 2 || sources[0].rows != sources[1].rows || sources[0].rows % lanes != 0)) {
    throw std::invalid_argument("only two sources of equal height, a multiple of 16, can be interleaved");
  }
  if (options.layout != Layout::tiles && (!own || s.codes != Codes::q4 || options.interleave)) {
    throw std::invalid_argument("only 4-bit weights that are not interleaved can lie by rows or columns");
  }
  PackedLinear w = layout(s, rows, in_features, options);
  struct Task {
    const PackedLinear& w;
    const std::vector<RowSource>& sources;
    const PackOptions& options;
    ThreadPool& pool;
  } task{w, sources, options, pool};
  // By blocks of columns: rows of one share bytes.
  pool.run(
      [](void* context, int thread) {
        const Task& t = *static_cast<Task*>(context);
        constexpr int block = block_tiles * lanes;
        const int blocks = (t.w.out_features + block - 1) / block;
        const auto first_of = [&](int n) { return std::min(t.pool.share(blocks, n) * block, t.w.out_features); };
        pack_rows(t.w, t.sources, t.options, first_of(thread), first_of(thread + 1));
      },
      &task);
  return w;
}

void PackedLinear::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

void unpack_row(const PackedLinear& w, int row, float* out) {
  if (w.codes == Codes::bf16) {
    const auto* p = reinterpret_cast<const uint16_t*>(w.tile(row / lanes));
    for (int k = 0; k < w.in_features; ++k) out[k] = bf16_to_float(p[(static_cast<size_t>(k / 2) * lanes + row % lanes) * 2 + k % 2]);
    return;
  }
  const Place place(w, row);
  for (int g = 0; g < w.groups; ++g) {
    const float scale = w.scales == Scales::f16 ? f16_to_float(place.f16_scale(g)) : place.f32_scale(g);
    float offset = 0.f;
    if (w.pairs_kind == Pairs::offsets) offset = bf16_to_float(place.pair(g / 2)[g % 2]);
    if (w.pairs_kind == Pairs::both) offset = bf16_to_float(place.pair(2 * g + 1)[0]);
    for (int k = g * w.group; k < (g + 1) * w.group; ++k) out[k] = scale * static_cast<float>(place.code(k) - w.zero()) + offset;
  }
}

}  // namespace fallow

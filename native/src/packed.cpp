#include "packed.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bits.h"

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
  row.codes.assign(n, 0);
  const int groups = n / s.group;
  row.scales.assign(groups, 0.f);
  row.offsets.assign(groups, 0.f);
  for (int b = 0; b < n / s.block; ++b, p += s.bytes) {
    uint8_t* c = row.codes.data() + b * s.block;
    float* scale = row.scales.data() + b * s.block / s.group;
    float* offset = row.offsets.data() + b * s.block / s.group;
    if (name == "Q4_0" || name == "Q4_1") {
      const uint8_t* q = p + s.bytes - 16;
      for (int i = 0; i < 16; ++i) {
        c[i] = q[i] & 15;
        c[i + 16] = q[i] >> 4;
      }
      scale[0] = f16_to_float(read16(p));
      if (s.offsets) offset[0] = f16_to_float(read16(p + 2)) + 8.f * scale[0];
    } else if (name == "Q5_0" || name == "Q5_1") {
      const uint8_t* q = p + s.bytes - 16;
      const uint32_t high = read32(q - 4);
      for (int i = 0; i < 16; ++i) {
        c[i] = static_cast<uint8_t>(((q[i] & 15) | (((high >> i) & 1u) << 4)) + 112);
        c[i + 16] = static_cast<uint8_t>(((q[i] >> 4) | (((high >> (i + 16)) & 1u) << 4)) + 112);
      }
      scale[0] = f16_to_float(read16(p));
      if (s.offsets) offset[0] = f16_to_float(read16(p + 2)) + 16.f * scale[0];
    } else if (name == "Q8_0") {
      for (int i = 0; i < 32; ++i) c[i] = static_cast<uint8_t>(p[2 + i] + 128);
      scale[0] = f16_to_float(read16(p));
    } else if (name == "Q4_K" || name == "Q5_K") {
      const float d = f16_to_float(read16(p));
      const float dmin = f16_to_float(read16(p + 2));
      const bool five = name == "Q5_K";
      const uint8_t* high = p + 16;
      const uint8_t* q = p + 16 + (five ? 32 : 0);
      const int centre = five ? 16 : 8;
      for (int j = 0; j < 8; ++j) {
        int sc = 0;
        int mn = 0;
        k_scale_min(p + 4, j, sc, mn);
        scale[j] = d * static_cast<float>(sc);
        offset[j] = static_cast<float>(centre) * scale[j] - dmin * static_cast<float>(mn);
        for (int i = 0; i < 32; ++i) {
          const uint8_t byte = q[(j / 2) * 32 + i];
          int code = (j % 2 == 0) ? (byte & 15) : (byte >> 4);
          if (five) code += ((high[i] >> j) & 1) * 16 + 112;
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

void put_codes(const PackedLinear& w, uint8_t* tile, int lane, const std::vector<uint8_t>& codes) {
  if (w.codes == Codes::q8) {
    for (int k = 0; k < w.in_features; ++k) tile[(k / 4) * 64 + lane * 4 + k % 4] = codes[k];
    return;
  }
  for (int g = 0; g < w.groups; ++g) {
    for (int i = 0; i < 16; ++i) {
      tile[g * 256 + (i / 4) * 64 + lane * 4 + i % 4] =
          static_cast<uint8_t>(codes[g * 32 + i] | (codes[g * 32 + 16 + i] << 4));
    }
  }
}

uint16_t* pair_slot(const PackedLinear& w, uint8_t* tile, int pair, int lane) {
  return reinterpret_cast<uint16_t*>(tile + w.pairs_at) + (static_cast<size_t>(pair) * lanes + lane) * 2;
}

void put_row(const PackedLinear& w, uint8_t* tile, int lane, const CodedRow& row) {
  put_codes(w, tile, lane, row.codes);
  for (int g = 0; g < w.groups; ++g) {
    const size_t at = static_cast<size_t>(g) * lanes + lane;
    if (w.scales == Scales::f32) reinterpret_cast<float*>(tile + w.scales_at)[at] = row.scales[g];
    float sum = 0.f;
    if (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both) {
      int total = 0;
      for (int i = 0; i < w.group; ++i) total += row.codes[g * w.group + i] - w.zero();
      sum = row.scales[g] * static_cast<float>(total) + row.offsets[g] * static_cast<float>(w.group);
    }
    if (w.pairs_kind == Pairs::offsets) pair_slot(w, tile, g / 2, lane)[g % 2] = float_to_bf16(row.offsets[g]);
    if (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both) {
      uint16_t* slot = pair_slot(w, tile, w.pairs_kind == Pairs::both ? 2 * g : g, lane);
      slot[0] = float_to_bf16(sum);
      slot[1] = float_to_bf16(sum - bf16_to_float(slot[0]));
    }
    if (w.pairs_kind == Pairs::both) pair_slot(w, tile, 2 * g + 1, lane)[0] = float_to_bf16(row.offsets[g]);
  }
}

// The float16 scales are kept as they are in the file: the bits are copied, not converted back.
void put_f16_scales(const PackedLinear& w, uint8_t* tile, int lane, const Storage& s, const uint8_t* p) {
  auto* scales = reinterpret_cast<uint16_t*>(tile + w.scales_at);
  for (int g = 0; g < w.groups; ++g) scales[static_cast<size_t>(g) * lanes + lane] = read16(p + static_cast<size_t>(g) * s.bytes);
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
  // Kernels read two tiles at a time: an odd count gets one more, all zero.
  w.bytes = static_cast<size_t>(w.tiles + w.tiles % 2) * w.tile_bytes;
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

PackedLinear pack_linear(const std::vector<RowSource>& sources, int in_features, const PackOptions& options) {
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
  PackedLinear w = layout(s, rows, in_features, options);
  CodedRow coded;
  std::vector<float> values;
  int base = 0;
  for (size_t n = 0; n < sources.size(); ++n) {
    const RowSource& source = sources[n];
    const Storage& from = storage_of(source.type);
    const size_t row_bytes = static_cast<size_t>(in_features) / from.block * from.bytes;
    for (int r = 0; r < source.rows; ++r) {
      const uint8_t* p = source.data + r * row_bytes;
      const int tile_index = options.interleave ? r / lanes * 2 + static_cast<int>(n) : (base + r) / lanes;
      const int lane = options.interleave ? r % lanes : (base + r) % lanes;
      uint8_t* tile = w.tile(tile_index);
      if (w.codes == Codes::bf16) {
        decode_row(from, p, in_features, coded, values);
        auto* out = reinterpret_cast<uint16_t*>(tile);
        for (int k = 0; k < in_features; ++k) {
          out[(static_cast<size_t>(k / 2) * lanes + lane) * 2 + k % 2] =
              from.name == std::string("BF16") ? read16(p + 2 * static_cast<size_t>(k)) : float_to_bf16(values[k]);
        }
      } else if (options.precision == "q8") {
        decode_row(from, p, in_features, coded, values);
        code_row_q8(values.data(), in_features, w.group, coded);
        put_row(w, tile, lane, coded);
      } else {
        code_row(from, p, in_features, coded);
        put_row(w, tile, lane, coded);
        if (w.scales == Scales::f16) put_f16_scales(w, tile, lane, from, p);
      }
    }
    base += source.rows;
  }
  return w;
}

void PackedLinear::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

void unpack_row(const PackedLinear& w, int row, float* out) {
  const uint8_t* tile = w.tile(row / lanes);
  const int lane = row % lanes;
  if (w.codes == Codes::bf16) {
    const auto* p = reinterpret_cast<const uint16_t*>(tile);
    for (int k = 0; k < w.in_features; ++k) out[k] = bf16_to_float(p[(static_cast<size_t>(k / 2) * lanes + lane) * 2 + k % 2]);
    return;
  }
  for (int g = 0; g < w.groups; ++g) {
    const size_t at = static_cast<size_t>(g) * lanes + lane;
    const uint8_t* scales = tile + w.scales_at;
    const float scale = w.scales == Scales::f16 ? f16_to_float(reinterpret_cast<const uint16_t*>(scales)[at])
                                                : reinterpret_cast<const float*>(scales)[at];
    const auto* pairs = reinterpret_cast<const uint16_t*>(tile + w.pairs_at);
    float offset = 0.f;
    if (w.pairs_kind == Pairs::offsets) offset = bf16_to_float(pairs[(static_cast<size_t>(g / 2) * lanes + lane) * 2 + g % 2]);
    if (w.pairs_kind == Pairs::both) offset = bf16_to_float(pairs[(static_cast<size_t>(2 * g + 1) * lanes + lane) * 2]);
    for (int i = 0; i < w.group; ++i) {
      const int k = g * w.group + i;
      int code = 0;
      if (w.codes == Codes::q8) {
        code = tile[(k / 4) * 64 + lane * 4 + k % 4];
      } else {
        const uint8_t byte = tile[g * 256 + (i % 16 / 4) * 64 + lane * 4 + i % 4];
        code = i < 16 ? byte & 15 : byte >> 4;
      }
      out[k] = scale * static_cast<float>(code - w.zero()) + offset;
    }
  }
}

}  // namespace fallow

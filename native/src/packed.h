// A weight matrix in the one layout that all kernels read: tiles of sixteen rows, lanes are rows.
//
// A tile holds, one after the other, each 64-byte aligned:
//   codes   4-bit: [group][4][16 rows][4 bytes]; byte b of quad j holds code 4j+b low, 16+4j+b high (group of 32)
//           8-bit: [group][group/4][16 rows][4 codes]
//           bf16:  [in_features/2][16 rows][2]
//   scales  [group][16 rows] float16 or float32
//   pairs   [pair][16 rows][2] bfloat16: what is multiplied with a token's own pairs (activations.h)
// A code c of a group stands for scale * (c - zero) + offset, zero being 8 for 4-bit and 128 for 8-bit codes.
//
// 4-bit weights of which a step reads a part lie otherwise, so that a part is in one piece (kernels/sparse_linear.h makes tiles
// of what it reads):
//   rows     a row after the other, of each [group][16] bytes with codes as above, scales, pairs; each part from a multiple of
//            16 bytes on, rows from multiples of 64
//   columns  in blocks of eight tiles, of each pairs [pair][8 tiles][16 rows][2], scales [group][8 tiles][16 rows], then codes
//            [in_features][64]: byte 16 i + 4 j + b of a column holds those of row 4 i + b of tile 2j low and of tile 2j + 1 high
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

// A register tile must be one function: its accumulators live in registers from the first product to the epilogue.
#define FALLOW_INLINE inline __attribute__((always_inline))
#define FALLOW_NOINLINE __attribute__((noinline))

namespace fallow {

class ThreadPool;

enum class Codes : int { q4 = 4, q8 = 8, bf16 = 16 };
enum class Layout : int { tiles = 0, rows = 1, columns = 2 };
enum class Scales : int { none = 0, f16 = 1, f32 = 2 };
// What the pairs of a quantised matrix carry:
//   offsets: pair p holds the offsets of groups 2p and 2p + 1
//   sums:    pair g holds the sum of the weights of group g, as a bfloat16 and what that leaves
//   both:    pair 2g holds the sum as above, pair 2g + 1 the offset and 0
enum class Pairs : int { none = 0, offsets = 1, sums = 2, both = 3 };

inline int pair_count(Pairs kind, int groups) {
  switch (kind) {
    case Pairs::none: return 0;
    case Pairs::offsets: return (groups + 1) / 2;
    case Pairs::sums: return groups;
    case Pairs::both: return 2 * groups;
  }
  return 0;
}

constexpr int lanes = 16;
constexpr int block_tiles = 8;  // of a block of columns

struct PackedLinear {
  int out_features = 0;
  int in_features = 0;
  int tiles = 0;   // ceil(out_features / 16); rows beyond are zero
  int groups = 0;  // of in_features; 0 for bf16
  int group = 0;   // 32 or 16
  Codes codes = Codes::q8;
  Scales scales = Scales::none;
  Pairs pairs_kind = Pairs::none;
  int pairs = 0;  // bfloat16 pairs a row
  size_t scales_at = 0, pairs_at = 0, tile_bytes = 0;  // offsets within a tile
  Layout layout = Layout::tiles;
  // Within what lies together: a tile, a row, a block.
  size_t unit_codes_at = 0, unit_scales_at = 0, unit_pairs_at = 0, unit_bytes = 0;
  Memory memory;             // its own, until it is moved to an arena
  uint8_t* data = nullptr;   // all of it; of tiles an even number
  size_t bytes = 0;

  uint8_t* tile(int t) const { return data + static_cast<size_t>(t) * tile_bytes; }
  uint8_t* unit(int u) const { return data + static_cast<size_t>(u) * unit_bytes; }
  int blocks() const { return (tiles + block_tiles - 1) / block_tiles; }
  uint8_t* column(int block, int k) const { return unit(block) + unit_codes_at + static_cast<size_t>(k) * 64; }
  // Where what tile `t` needs begins.
  const uint8_t* first_of(int t) const { return unit(layout == Layout::tiles ? t : (layout == Layout::rows ? t * lanes : t / block_tiles)); }
  void move_to(Arena& arena);
  int zero() const { return codes == Codes::q4 ? 8 : 128; }
};

// One source of rows: `data` holds `rows` rows of a storage type in GGUF's block format ("F32", "Q4_1", ...).
struct RowSource {
  std::string type;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  int rows = 0;
};

struct PackOptions {
  bool interleave = false;  // two sources of equal height: tile 2i of the first, tile 2i+1 of the second
  bool asymmetric = false;  // activations will carry a midpoint a group: keep the sums of the weights
  std::string precision;    // "own", or "q8": 8-bit codes in groups of 32, or "bf16"
  Layout layout = Layout::tiles;  // another for 4-bit codes that are not interleaved
};

// A row as codes: of group g, code c stands for scales[g] * (c - zero) + offsets[g].
struct CodedRow {
  std::vector<uint8_t> codes;
  std::vector<float> scales, offsets;
};

// 8-bit codes that span each group from its smallest to its largest value.
void code_row_q8(const float* values, int n, int group, CodedRow& row);

// The values of a source, float32 [rows][in_features]. Throws std::invalid_argument on a type or size that does not fit.
std::vector<float> values_of(const RowSource& source, int in_features);

// Packs the sources, one below the other. Throws std::invalid_argument on a type, shape or size that does not fit.
PackedLinear pack_linear(const std::vector<RowSource>& sources, int in_features, const PackOptions& options, ThreadPool& pool);

// Row `row` as the kernels see it, float32 [in_features].
void unpack_row(const PackedLinear& w, int row, float* out);

}  // namespace fallow

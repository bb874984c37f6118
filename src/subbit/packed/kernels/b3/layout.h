// The bytes of the layouts B3 and B2, what a product is given, and how values are read and rounded.
// layout.py beside this folder says what the bytes mean.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX 1
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

namespace {

enum Isa { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, NEON = 4, NEONDOT = 5, AMX = 6 };
constexpr int kIsas = 7;
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };

constexpr int kBlock = 128;   // columns of a tile
constexpr int kRows = 4;      // rows of a tile
constexpr int kPlane = 64;    // bytes of one code plane of a tile
constexpr int kTiles = 4;     // tiles of a unit: 16 rows x 128 columns
constexpr int kMaxBatch = 16;
constexpr int kSquare = 1024;     // bytes of an AMX tile: 16 rows of 64
constexpr int kSquareBatch = 5;  // from so many vectors on AMX is faster than AVX-512
constexpr int kSquareGroups = 4;  // sixteens of vectors at a time; more of bfloat16 are a prompt

// A layout: bits of a code, bytes of a level record (levels + 128, then the bfloat16 scale).
template <int BITS, int RECORD>
struct Form {
    static constexpr int kBits = BITS, kRecord = RECORD;
    // Code planes of a tile with K groups of 16 columns.
    template <int K>
    static constexpr int kPlanes = (16 * K * BITS + 127) / 128;
    // Bytes of a unit of four such tiles.
    template <int K>
    static constexpr int kUnit = kTiles * (kPlanes<K> * kPlane + kRows * RECORD);
};
using B3 = Form<3, 12>;
using B2 = Form<2, 6>;

// Which byte of a level record the 16 entries of a row's table are (255: none, so 0), and what is
// or-ed into them so that no byte is the level 0. B3 without and with levels of salient columns; B2.
alignas(32) const uint8_t kPlaces[3][32] = {
    {7, 0, 1, 2, 3, 4, 5, 6, 255, 255, 255, 255, 255, 255, 255, 255,
     0, 0, 0, 0, 0, 0, 0, 0, 128, 128, 128, 128, 128, 128, 128, 128},
    {255, 0, 1, 2, 3, 4, 5, 6, 255, 6, 7, 8, 9, 255, 255, 255,
     128, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 128, 128, 128},
    {3, 0, 1, 2, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
     0, 0, 0, 0, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128}};

struct Shape {
    int64_t rows, cols, full, strips, stride;
    int bits;               // 3 or 2
    bool half, salient;     // whether a unit of at most 64 columns follows; whether a column is
    const uint8_t* places;  // a row of `kPlaces`
    int64_t blocks() const { return full + half; }
    int64_t width() const { return full * kBlock + (half ? kBlock / 2 : 0); }
};

template <class F>
constexpr int64_t stride_of(int64_t full, bool half) {
    return full * F::template kUnit<8> + (half ? F::template kUnit<4> : 0);
}

// The number of bytes tells the layout.
bool make_shape(int64_t rows, int64_t cols, int64_t bytes, const uint8_t* flags,
                int64_t flag_bytes, Shape* s) {
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX) return false;
    const int64_t rest = cols % kBlock;
    s->rows = rows, s->cols = cols;
    s->half = rest > 0 && rest <= kBlock / 2;
    s->full = cols / kBlock + (rest > kBlock / 2);
    s->strips = (rows + kTiles * kRows - 1) / (kTiles * kRows);
    s->bits = bytes == s->strips * stride_of<B2>(s->full, s->half) ? 2 : 3;
    s->stride = s->bits == 2 ? stride_of<B2>(s->full, s->half) : stride_of<B3>(s->full, s->half);
    if (bytes != s->strips * s->stride || flag_bytes != s->width() + 1) return false;
    uint8_t seen = 0;
    for (int64_t i = 0; i < s->width(); i++) seen |= flags[i];
    if (seen & ~8) return false;  // code | flag is looked up in a table of sixteen
    s->salient = seen != 0;
    if (s->bits == 2 && (s->salient || flags[s->width()])) return false;
    s->places = kPlaces[s->bits == 2 ? 2 : flags[s->width()] != 0];
    return true;
}

// Quantised activations: of each block the vectors one after the other, `kBlock` values of the high
// plane, then of the low one. For AVX2 both planes together are one int16: of each 16 columns the
// even ones, then the odd ones. For AMX a tile has four columns of sixteen vectors in a row.
struct Acts {
    const int8_t* values;  // (blocks, batch, planes, 128), or as `Order` says
    const float* scale;    // (blocks, batch)
    const int32_t* start;  // (blocks, batch, 4): -128 * sum of the block in the first of four
};

enum Order {
    PLANES,
    WORDS,    // int16 (blocks, batch, 8, 2, 8)
    // (blocks, sixteens of vectors, halves, planes, 16 x 4 columns, 16, 4); start is (blocks, batch)
    SQUARES,
};

struct Job {
    Shape shape;
    const uint8_t* tiles;
    const uint8_t* flags;  // (width + 1): 0, or 8 in salient columns; which row of `kPlaces`
    Acts acts;
    int batch;
    float* out;  // (batch, rows)
};

// In a unit with K groups of 16 columns: the code planes of tile `t`, and its level records.
template <class F, int K>
INLINE const uint8_t* planes_of(const uint8_t* unit, int t) {
    return unit + t * F::template kPlanes<K> * kPlane;
}

template <class F, int K>
INLINE const uint8_t* records_of(const uint8_t* unit, int t) {
    return unit + kTiles * F::template kPlanes<K> * kPlane + t * kRows * F::kRecord;
}

// Keeps loads where they are: compilers would move those that two steps share to the stack, which
// costs more than loading them again.
INLINE void stay() { __asm__ volatile("" ::: "memory"); }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load_value(const float* x, int64_t i) { return x[i]; }
INLINE float load_value(const uint16_t* x, int64_t i) { return bits_to_float((uint32_t)x[i] << 16); }

template <class F>
INLINE float record_scale(const uint8_t* record) {
    return bits_to_float((uint32_t)record[F::kRecord - 2] << 16 |
                         (uint32_t)record[F::kRecord - 1] << 24);
}

// The sums of `count` rows of tile t with vector m, put where they belong.
INLINE void store_sums(const Job& j, int64_t t, int m, const float* sums, int first, int count) {
    for (int r = 0; r < count; r++) {
        const int64_t row = t * kRows + first + r;
        if (row < j.shape.rows) j.out[m * j.shape.rows + row] = sums[r];
    }
}

// Strips that are read side by side: a core reads several streams at once faster than one.
constexpr int kStreams = 4;

}  // namespace

// Matrix products with weights in the layouts B3 and B2 (layout.py says what the bytes mean).
//
// Activations become one or two int8 planes for each block of 128 columns: x = s (256 hi + lo), or
// s hi with one plane. A tile of 4 rows x 128 columns is decoded in registers, 16 columns of its
// rows at a time: shift, mask, look the int8 level up in the row's 16-entry table, integer dot
// product. Per block the integers are multiplied by the scales of row and activations. Several tiles
// and several vectors at once share the loads of activations and the decoded levels. For AMX, whose
// tiles come from memory, the levels go through a buffer that stays in the first cache.
//
// Plain C++17 without the standard library. Every instruction set is compiled into the one object
// by target attributes; the caller names the one to use.

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
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
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

// ---- activations -------------------------------------------------------------------------------

// Round to the nearest integer, for |v| < 2^22.
INLINE float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// Bytes of a vector's values in a block.
constexpr int values_of(Order order, int P) { return order == WORDS ? 2 * kBlock : P * kBlock; }

template <Order ORDER, int P>
INLINE void store_quantised(const int32_t* q, int8_t* out) {
    if (ORDER == WORDS) {
        int16_t* words = (int16_t*)out;
        for (int k = 0; k < kBlock / 16; k++)
            for (int i = 0; i < 8; i++) {
                words[16 * k + i] = (int16_t)q[16 * k + 2 * i];
                words[16 * k + 8 + i] = (int16_t)q[16 * k + 2 * i + 1];
            }
        return;
    }
    for (int i = 0; i < kBlock; i++) {
        const int32_t high = P == 2 ? (q[i] + 128) >> 8 : q[i];  // then -128 <= low <= 127
        out[i] = (int8_t)high;
        if (P == 2) out[kBlock + i] = (int8_t)(q[i] - 256 * high);
    }
}

template <Order ORDER, int P, class T>
INLINE void quantise_block(const T* x, int n, int8_t* out, float* scale, int32_t* start) {
    float value[kBlock];
    int32_t q[kBlock];
    if (n < kBlock) memset(value, 0, sizeof value);
    for (int i = 0; i < n; i++) value[i] = load_value(x, i);
    uint32_t top = 0;  // largest |x|: as bits, NaN is larger than Inf is larger than the rest
    for (int i = 0; i < kBlock; i++) {
        const uint32_t bits = float_to_bits(value[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    const float largest = bits_to_float(top);
    const float range = P == 2 ? 32512.0f : 127.0f;  // 256 * 127
    const bool finite = top < 0x7f800000;
    const bool usable = finite && largest >= 1e-30f;  // less counts as zero
    const float inverse = usable ? range / largest : 0.0f;
    *scale = usable ? largest / range : finite ? 0.0f : bits_to_float(0x7fc00000);
    int32_t sum = 0;
    if (!finite) memset(value, 0, sizeof value);
    for (int i = 0; i < kBlock; i++) {
        q[i] = (int32_t)nearest(value[i] * inverse);
        sum += q[i];
    }
    store_quantised<ORDER, P>(q, out);
    start[0] = -128 * sum;
    start[1] = start[2] = start[3] = 0;
}

INLINE int sixteens_of(int batch) { return (batch + 15) / 16; }

// Bytes of a block's squares, by the number of vectors.
INLINE int64_t squares_of(int batch, int P) { return sixteens_of(batch) * 2 * P * kSquare; }

// A block of one vector, number m, among the squares of all. Places of no vector are left as they are:
// nothing reads their sums.
template <int P>
INLINE void store_squares(const int8_t* values, int m, int8_t* block) {
    for (int p = 0; p < P; p++)
        for (int i = 0; i < kBlock; i += 4)
            memcpy(block + (m / 16 * 2 * P + i / 64 * P + p) * kSquare + i % 64 * 16 + m % 16 * 4,
                   values + p * kBlock + i, 4);
}

template <Order ORDER, int P, class T>
INLINE void quantise_all(const Shape& s, const T* x, int batch, int8_t* values, float* scale,
                         int32_t* start) {
    for (int m = 0; m < batch; m++)
        for (int64_t b = 0; b < s.blocks(); b++) {
            const int64_t at = b * batch + m, left = s.cols - b * kBlock;
            const T* from = x + m * s.cols + b * kBlock;
            const int n = left < kBlock ? (int)left : kBlock;
            if (ORDER == SQUARES) {
                int8_t own[P * kBlock];
                int32_t first[4];
                quantise_block<PLANES, P>(from, n, own, scale + at, first);
                store_squares<P>(own, m, values + b * squares_of(batch, P));
                start[at] = first[0];
            } else {
                quantise_block<ORDER, P>(from, n, values + at * values_of(ORDER, P), scale + at,
                                         start + 4 * at);
            }
        }
}

// Strips that are read side by side: a core reads several streams at once faster than one.
constexpr int kStreams = 4;

// ---- portable ----------------------------------------------------------------------------------

INLINE void store_sums(const Job& j, int64_t t, int m, const float* sums, int first, int count) {
    for (int r = 0; r < count; r++) {
        const int64_t row = t * kRows + first + r;
        if (row < j.shape.rows) j.out[m * j.shape.rows + row] = sums[r];
    }
}

// Codes of columns 16k .. 16k + 15 of one row of a tile.
template <class F>
INLINE void decode_codes(const uint8_t* tile, int r, int k, uint8_t* out) {
    const uint8_t *A = tile + 16 * r, *B = A + kPlane, *C = B + kPlane;
    if (F::kBits == 2) {
        const uint8_t* plane = k < 4 ? A : B;
        for (int j = 0; j < 16; j++) out[j] = plane[j] >> 2 * (k % 4) & 3;
        return;
    }
    for (int j = 0; j < 16; j++) {
        switch (k) {
            case 0: out[j] = A[j] & 7; break;
            case 1: out[j] = A[j] >> 3 & 7; break;
            case 2: out[j] = B[j] & 7; break;
            case 3: out[j] = B[j] >> 3 & 7; break;
            case 4: out[j] = C[j] & 7; break;
            case 5: out[j] = C[j] >> 3 & 7; break;
            case 6: out[j] = A[j] >> 6 | (C[j] >> 4 & 4); break;
            default: out[j] = B[j] >> 6 | (C[j] >> 5 & 4); break;
        }
    }
}

INLINE void level_table(const uint8_t* record, const uint8_t* places, int8_t* table) {
    for (int i = 0; i < 16; i++)
        table[i] = places[i] == 255 ? 0 : (int8_t)(record[places[i]] - 128);
}

template <class F, int K>
INLINE void decode_row(const uint8_t* planes, const uint8_t* record, const uint8_t* places,
                       const uint8_t* flags, int r, int8_t* out) {
    int8_t table[16];
    uint8_t index[16];
    level_table(record, places, table);
    for (int k = 0; k < K; k++) {
        decode_codes<F>(planes, r, k, index);
        for (int j = 0; j < 16; j++) out[16 * k + j] = table[index[j] | flags[16 * k + j]];
    }
}

template <class F, int P, int K>
INLINE void portable_block(const Job& j, const uint8_t* unit, int t, int64_t b,
                           float (*sums)[kRows]) {
    for (int r = 0; r < kRows; r++) {
        int8_t w[kBlock];
        const uint8_t* record = records_of<F, K>(unit, t) + r * F::kRecord;
        decode_row<F, K>(planes_of<F, K>(unit, t), record, j.shape.places, j.flags + b * kBlock, r,
                         w);
        const float scale = record_scale<F>(record);
        for (int m = 0; m < j.batch; m++) {
            const int64_t at = b * j.batch + m;
            const int8_t* x = j.acts.values + at * P * kBlock;
            int32_t high = 0, low = 0;
            for (int i = 0; i < 16 * K; i++) high += (int16_t)w[i] * (int16_t)x[i];
            if (P == 2)
                for (int i = 0; i < 16 * K; i++) low += (int16_t)w[i] * (int16_t)x[kBlock + i];
            const int32_t sum = P == 2 ? 256 * high + low : high;
            sums[m][r] += (float)sum * (scale * j.acts.scale[at]);
        }
    }
}

template <class F, int P>
void strips_portable(const Job& j, int64_t strip, int n) {
    for (int t = 0; t < n * kTiles; t++) {
        float sums[kMaxBatch][kRows] = {};
        const uint8_t* unit = j.tiles + (strip + t / kTiles) * j.shape.stride;
        for (int64_t b = 0; b < j.shape.full; b++, unit += F::template kUnit<8>)
            portable_block<F, P, 8>(j, unit, t % kTiles, b, sums);
        if (j.shape.half) portable_block<F, P, 4>(j, unit, t % kTiles, j.shape.full, sums);
        for (int m = 0; m < j.batch; m++) store_sums(j, strip * kTiles + t, m, sums[m], 0, kRows);
    }
}

// ---- x86 ---------------------------------------------------------------------------------------
#if defined(__x86_64__)

#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define T256 __attribute__((target("avx2,fma")))

// How far ahead of the unit in work its successors are asked for, in bytes. A step asks for its
// share of most of a unit's lines: asked for all at once they hold up the loads.
template <class F>
constexpr int kAhead = 3 * F::template kUnit<8>;

// Of `n` strips read side by side, where one goes on: once it ends, `n` strips further on.
template <class F>
INLINE const uint8_t* ahead_of(const Shape& s, const uint8_t* unit, int64_t b, int n) {
    const bool ends = b * F::template kUnit<8> + kAhead<F> >= s.stride;
    return unit + kAhead<F> + (ends ? (n - 1) * s.stride : 0);
}

constexpr int64_t kReadAhead = 2048 / 8;  // words, in a loop that only reads

INLINE void ask_for(const uint8_t* line) { _mm_prefetch((const char*)line, _MM_HINT_T0); }

// ---- AVX-512: four rows x 16 columns at a time

T512 INLINE __m512i four_times(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}

// The level records of a tile's four rows, one in each lane: levels from its first byte on, the scale
// in its last two.
template <class F, int K>
T512 INLINE __m512i records_512(const uint8_t* unit, int t) {
    constexpr int dwords = kRows * F::kRecord / 4;
    const __m512i all = _mm512_maskz_loadu_epi32((1 << dwords) - 1, records_of<F, K>(unit, t));
    if (F::kBits == 3)
        return _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), all);
    // words 0, 1 of a row, and its scale, word 2, in the upper half of the last dword
    return _mm512_permutexvar_epi16(
        _mm512_setr_epi32(0x10000, 0x20002, 0x20002, 0x20002, 0x40003, 0x50005, 0x50005, 0x50005,
                          0x70006, 0x80008, 0x80008, 0x80008, 0xa0009, 0xb000b, 0xb000b, 0xb000b),
        all);
}

// The level tables (level + 128) of a tile's four rows, one in each lane.
template <class F, int K>
T512 INLINE __m512i table_512(const uint8_t* unit, int t, const uint8_t* places) {
    const __m512i entries = four_times(places), zeros = four_times(places + 16);
    return _mm512_or_si512(_mm512_shuffle_epi8(records_512<F, K>(unit, t), entries), zeros);
}

// The scales of a tile's four rows: the upper half of the last dword of each lane.
template <class F, int K>
T512 INLINE __m512 scales_512(const uint8_t* unit, int t) {
    const __m512i all = records_512<F, K>(unit, t);  // clang has a macro, where a comma separates
    const __m512i last = _mm512_shuffle_epi32(all, (_MM_PERM_ENUM)0xff);
    return _mm512_castsi512_ps(_mm512_and_si512(last, _mm512_set1_epi32((int)0xffff0000)));
}

// `code` has a code in the low bits of each byte. B3: code | flag is its place.
template <class F>
T512 INLINE __m512i levels_512(__m512i table, __m512i code, __m512i flag) {
    if (F::kBits == 2)
        return _mm512_shuffle_epi8(table, _mm512_and_si512(code, _mm512_set1_epi8(3)));
    return _mm512_shuffle_epi8(table,
                               _mm512_ternarylogic_epi32(code, _mm512_set1_epi8(7), flag, 0xea));
}

// Low two bits of each byte from `low`, the rest from `rest`.
T512 INLINE __m512i merged_512(__m512i low, __m512i rest) {
    return _mm512_ternarylogic_epi32(low, rest, _mm512_set1_epi8(3), 0xe4);
}

T512 INLINE __m512 scaled_512(__m512i sum, __m512 scales, float act, __m512 to) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(act)), to);
}

// What R tiles have to do with G vectors in one block, in registers.
template <int P, int R, int G>
struct Work512 {
    __m512i table[R], sum[P][R][G];
};

// Multiply 16 columns of R tiles: `code` has their codes in the low bits of each byte.
template <class F, int P, int R, int G>
T512 INLINE void columns_512(Work512<P, R, G>& work, const __m512i* code, const uint8_t* flags,
                             const int8_t* x) {
    const __m512i flag = four_times(flags);
    __m512i w[R];
    for (int r = 0; r < R; r++) w[r] = levels_512<F>(work.table[r], code[r], flag);
    for (int g = 0; g < G; g++)
        for (int p = 0; p < P; p++) {
            const __m512i value = four_times(x + (g * P + p) * kBlock);
            for (int r = 0; r < R; r++)
                work.sum[p][r][g] = _mm512_dpbusd_epi32(work.sum[p][r][g], w[r], value);
        }
}

// Tiles t .. t + R - 1 of a unit with vectors m .. m + G - 1. Planes are taken up one after the
// other, for want of registers.
template <class F, int P, int K, int R, int G>
T512 INLINE void tiles_512(const Job& j, const uint8_t* unit, const uint8_t* ahead, int t,
                           int64_t b, int m, __m512 (*sums)[G]) {
    const int64_t at = b * j.batch + m;
    const int8_t* x = j.acts.values + at * P * kBlock;
    const uint8_t *flags = j.flags + b * kBlock;
    ahead += t * (F::kBits == 3 ? 4 : 2) * kPlane;
    Work512<P, R, G> work;
    [[maybe_unused]] __m512i plane[R], code[R], kept[R];
    for (int r = 0; r < R; r++) {
        work.table[r] = table_512<F, K>(unit, t + r, j.shape.places);
        for (int g = 0; g < G; g++) {
            work.sum[0][r][g] = _mm512_setzero_si512();
            work.sum[P - 1][r][g] = four_times(j.acts.start + 4 * (at + g));
        }
    }
#define COLUMNS(k)                                                                     \
    stay();                                                                            \
    if (F::kBits == 3 || (k) < 5)                                                      \
        for (int i = (k) * R / 2; i < ((k) + 1) * R / 2; i++) ask_for(ahead + kPlane * i); \
    columns_512<F, P, R, G>(work, code, flags + 16 * (k), x + 16 * (k))
#define EACH(...) for (int r = 0; r < R; r++) __VA_ARGS__
#define LOAD(i) EACH(plane[r] = _mm512_loadu_si512(planes_of<F, K>(unit, t + r) + (i) * kPlane))
#define SHIFTED(bits) EACH(code[r] = _mm512_srli_epi16(plane[r], bits))
    LOAD(0);
    EACH(code[r] = plane[r]);
    COLUMNS(0);
    SHIFTED(F::kBits);
    COLUMNS(1);
    if constexpr (F::kBits == 2) {
        SHIFTED(4);
        COLUMNS(2);
        SHIFTED(6);
        COLUMNS(3);
        if constexpr (K == 8) {
            LOAD(1);
            EACH(code[r] = plane[r]);
            COLUMNS(4);
            SHIFTED(2);
            COLUMNS(5);
            SHIFTED(4);
            COLUMNS(6);
            SHIFTED(6);
            COLUMNS(7);
        }
    } else {
        if (K == 8) {
            EACH(kept[r] = _mm512_srli_epi16(plane[r], 6));
            LOAD(2);
            EACH(code[r] = plane[r]);
            COLUMNS(4);
            SHIFTED(3);
            COLUMNS(5);
            EACH(code[r] = merged_512(kept[r], _mm512_srli_epi16(plane[r], 4)));
            COLUMNS(6);
            EACH(kept[r] = _mm512_srli_epi16(plane[r], 5));
        }
        LOAD(1);
        EACH(code[r] = plane[r]);
        COLUMNS(2);
        SHIFTED(3);
        COLUMNS(3);
        if (K == 8) {
            EACH(code[r] = merged_512(_mm512_srli_epi16(plane[r], 6), kept[r]));
            COLUMNS(7);
        }
    }
#undef SHIFTED
#undef LOAD
#undef EACH
#undef COLUMNS
    for (int r = 0; r < R; r++) {
        const __m512 scales = scales_512<F, K>(unit, t + r);
        for (int g = 0; g < G; g++) {
            __m512i s = work.sum[0][r][g];
            if (P == 2) s = _mm512_add_epi32(_mm512_slli_epi32(s, 8), work.sum[P - 1][r][g]);
            sums[r][g] = scaled_512(s, scales, j.acts.scale[at + g], sums[r][g]);
        }
    }
}

template <class F, int P, int K, int R, int G>
T512 INLINE void units_512(const Job& j, const uint8_t* unit, int n, int64_t b, int m,
                           __m512 (*sums)[kTiles][G]) {
    for (int s = 0; s < n; s++, unit += j.shape.stride)
        for (int t = 0; t < kTiles; t += R)
            tiles_512<F, P, K, R, G>(j, unit, ahead_of<F>(j.shape, unit, b, n), t, b, m,
                                     sums[s] + t);
}

template <class F, int P, int R, int G>
T512 INLINE void group_512(const Job& j, int64_t strip, int n, int m) {
    __m512 sums[kStreams][kTiles][G];
    for (int t = 0; t < n * kTiles; t++)
        for (int g = 0; g < G; g++) sums[t / kTiles][t % kTiles][g] = _mm512_setzero_ps();
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += F::template kUnit<8>)
        units_512<F, P, 8, R, G>(j, unit, n, b, m, sums);
    if (j.shape.half) units_512<F, P, 4, R, G>(j, unit, n, j.shape.full, m, sums);
    for (int t = 0; t < n * kTiles; t++)
        for (int g = 0; g < G; g++) {
            float lanes[16], rows[kRows];
            _mm512_storeu_ps(lanes, sums[t / kTiles][t % kTiles][g]);
            for (int i = 0; i < kRows; i++)
                rows[i] = (lanes[4 * i] + lanes[4 * i + 1]) + (lanes[4 * i + 2] + lanes[4 * i + 3]);
            store_sums(j, strip * kTiles + t, m + g, rows, 0, kRows);
        }
}

template <class F, int P>
T512 void strips_512(const Job& j, int64_t strip, int n) {
    int m = 0;
    for (; m + 8 <= j.batch; m += 8) group_512<F, P, 1, 8>(j, strip, n, m);
    for (; m + 4 <= j.batch; m += 4) group_512<F, P, 2, 4>(j, strip, n, m);
    for (; m + 2 <= j.batch; m += 2) group_512<F, P, 2, 2>(j, strip, n, m);
    if (m < j.batch) group_512<F, P, 4, 1>(j, strip, n, m);
}

#if defined(HAS_AMX)
// ---- AMX: sixteen rows x 64 columns with sixteen vectors at a time

#define TAMX \
    __attribute__((target("amx-tile,amx-int8,amx-bf16," \
                          "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

// Codes of columns 16k .. 16k + 15 in the low bits of each byte.
template <class F>
TAMX INLINE __m512i code_512(int k, __m512i A, __m512i B, __m512i C) {
    if (F::kBits == 2) return _mm512_srli_epi16(k < 4 ? A : B, 2 * (k % 4));
    if (k == 6) return merged_512(_mm512_srli_epi16(A, 6), _mm512_srli_epi16(C, 4));
    if (k == 7) return merged_512(_mm512_srli_epi16(B, 6), _mm512_srli_epi16(C, 5));
    const __m512i plane = k < 2 ? A : k < 4 ? B : C;
    return k % 2 ? _mm512_srli_epi16(plane, 3) : plane;
}

// Levels of a tile's four rows: rows 4t .. 4t + 3 of a square for each 64 columns.
template <class F, int K>
TAMX INLINE void decode_squares(const uint8_t* unit, int t, const uint8_t* flags,
                                const uint8_t* places, uint8_t* out) {
    constexpr int count = F::template kPlanes<K>;
    const uint8_t* codes = planes_of<F, K>(unit, t);
    const __m512i A = _mm512_loadu_si512(codes);
    const __m512i B = count > 1 ? _mm512_loadu_si512(codes + kPlane) : A;
    const __m512i C = count > 2 ? _mm512_loadu_si512(codes + 2 * kPlane) : A;
    const __m512i table = table_512<F, K>(unit, t, places);
#pragma GCC unroll 2
    for (int h = 0; h < K / 4; h++) {
        __m512i w[4];  // of each 16 columns four rows
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            w[i] = levels_512<F>(table, code_512<F>(4 * h + i, A, B, C),
                                 four_times(flags + 64 * h + 16 * i));
        const __m512i a = _mm512_shuffle_i32x4(w[0], w[1], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(w[0], w[1], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(w[2], w[3], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(w[2], w[3], 0xee);
        uint8_t* rows = out + h * kSquare + t * kRows * 64;
        _mm512_store_si512(rows, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_store_si512(rows + 64, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_store_si512(rows + 128, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_store_si512(rows + 192, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

// 0, n, 2 n ... 15 n.
T512 INLINE __m512i multiples_of(int n) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(_mm512_set1_epi32(n), lanes);
}

// The first `n` of sixteen, or all.
INLINE __mmask16 first_of(int64_t n) { return (__mmask16)((1u << (n < 16 ? n : 16)) - 1); }

// Sums of two units with sixteen vectors, by plane.
struct alignas(64) Sums {
    int32_t units[2][2][kTiles * kRows][16];
    // What is written while the other is read then differs from it in the last twelve bits of the
    // address, which is all that a processor compares at first.
    uint8_t apart[2 * kSquare];
};

template <class F, int K>
TAMX INLINE void decode_unit(const Job& j, const uint8_t* unit, const uint8_t* ahead, int64_t b,
                             uint8_t* levels) {
    constexpr int lines = (F::template kUnit<8> / kPlane + kTiles) / kTiles;
    for (int t = 0; t < kTiles; t++) {
        for (int i = 0; i < lines; i++) ask_for(ahead + (lines * t + i) * kPlane);
        decode_squares<F, K>(unit, t, j.flags + b * kBlock, j.shape.places, levels);
    }
}

// Half of two units with sixteen vectors, added to the tiles 0 to 3: a sum waits for the one before
// it, and four take turns.
template <int P>
TAMX INLINE void multiply_half(const uint8_t* first, const uint8_t* second, const int8_t* vectors) {
    _tile_loadd(4, vectors, 64);
    if (P == 2) _tile_loadd(5, vectors + kSquare, 64);
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
    _tile_dpbusd(0, 6, 4);
    if (P == 2) _tile_dpbusd(1, 6, 5);
    _tile_dpbusd(2, 7, 4);
    if (P == 2) _tile_dpbusd(3, 7, 5);
}

template <int P, int K>
TAMX INLINE void multiply_units(const uint8_t* first, const uint8_t* second, const int8_t* vectors,
                                Sums& to) {
    stay();  // what the AMX instructions read and write is not told to the compiler
    _tile_zero(0);
    if (P == 2) _tile_zero(1);
    _tile_zero(2);
    if (P == 2) _tile_zero(3);
    multiply_half<P>(first, second, vectors);
    if (K == 8) multiply_half<P>(first + kSquare, second + kSquare, vectors + P * kSquare);
    _tile_stored(0, to.units[0][0], 64);
    if (P == 2) _tile_stored(1, to.units[0][1], 64);
    _tile_stored(2, to.units[1][0], 64);
    if (P == 2) _tile_stored(3, to.units[1][1], 64);
    stay();
}

template <class F, int P, int K>
TAMX INLINE void add_unit(const Job& j, const uint8_t* unit, int64_t b, int g,
                          const int32_t (*planes)[kTiles * kRows][16], __m512* sums) {
    const int64_t at = b * j.batch + 16 * g;
    const __mmask16 vectors = first_of(j.batch - 16 * g);
    const __m512i start = _mm512_maskz_loadu_epi32(vectors, j.acts.start + at);
    const __m512 act = _mm512_maskz_loadu_ps(vectors, j.acts.scale + at);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; t++) {
        const __m512 scales = scales_512<F, K>(unit, t);
        const __m512 scale[kRows] = {
            _mm512_shuffle_f32x4(scales, scales, 0x00), _mm512_shuffle_f32x4(scales, scales, 0x55),
            _mm512_shuffle_f32x4(scales, scales, 0xaa), _mm512_shuffle_f32x4(scales, scales, 0xff)};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            const int i = kRows * t + r;
            __m512i sum = _mm512_load_si512(planes[0][i]);
            if (P == 2)
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(planes[1][i]));
            sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum, start)),
                                      _mm512_mul_ps(scale[r], act), sums[i]);
        }
    }
}

// Block b of n strips with all vectors. What was just written cannot be read at once: a unit's sums
// are added up while the next one is multiplied.
template <class F, int P, int K>
TAMX INLINE void block_amx(const Job& j, int64_t strip, int n, int64_t b,
                           __m512 (*sums)[kSquareGroups][kTiles * kRows]) {
    alignas(64) uint8_t levels[kStreams][2 * kSquare];
    Sums found[2];
    const int64_t stride = j.shape.stride;
    const uint8_t* unit = j.tiles + strip * stride + b * F::template kUnit<8>;
    for (int s = 0; s < n; s++)
        decode_unit<F, K>(j, unit + s * stride, ahead_of<F>(j.shape, unit + s * stride, b, n), b,
                          levels[s]);
    const int8_t* values = j.acts.values + b * squares_of(j.batch, P);
    const int pairs = (n + 1) / 2, count = sixteens_of(j.batch) * pairs;
    for (int u = 0; u <= count; u++) {
        if (u < count) {
            const int first = u % pairs * 2, second = first + 1 < n ? first + 1 : first;
            multiply_units<P, K>(levels[first], levels[second],
                                 values + u / pairs * 2 * P * kSquare, found[u % 2]);
        }
        if (u == 0) continue;
        const int first = (u - 1) % pairs * 2, g = (u - 1) / pairs;
        for (int s = first; s < first + 2 && s < n; s++)
            add_unit<F, P, K>(j, unit + s * stride, b, g, found[(u - 1) % 2].units[s - first],
                              sums[s][g]);
    }
}

// All eight tiles have 16 rows of 64 bytes.
TAMX INLINE void load_tile_shapes() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {0};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    stay();
    _tile_loadconfig(&shapes);
}

template <class F, int P>
TAMX void strips_amx(const Job& j, int64_t strip, int n) {
    constexpr int rows = kTiles * kRows;
    __m512 sums[kStreams][kSquareGroups][rows];
    const int groups = sixteens_of(j.batch);
    for (int s = 0; s < n; s++)
        for (int i = 0; i < groups * rows; i++) sums[s][i / rows][i % rows] = _mm512_setzero_ps();
    load_tile_shapes();
    for (int64_t b = 0; b < j.shape.full; b++) block_amx<F, P, 8>(j, strip, n, b, sums);
    if (j.shape.half) block_amx<F, P, 4>(j, strip, n, j.shape.full, sums);
    _tile_release();
    const __m512i down = multiples_of(16);
    for (int s = 0; s < n; s++) {
        const int64_t row = (strip + s) * rows;
        const __mmask16 there = first_of(j.shape.rows - row);
        for (int m = 0; m < j.batch; m++)
            _mm512_mask_storeu_ps(j.out + m * j.shape.rows + row, there,
                                  _mm512_i32gather_ps(
                                      down, (const float*)sums[s][m / 16] + m % 16, 4));
    }
}

#endif
// ---- AVX2 and AVX-VNNI: two rows x 16 columns at a time

T256 INLINE __m256i twice(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}

// Two rows of a tile (half 0 or 1): their level tables, one in each lane, and their scales.
template <class F, int K>
T256 INLINE void records_256(const uint8_t* unit, int t, int half, const uint8_t* places,
                             __m256i* table, __m256* scale) {
    const __m256i entries = twice(places), zeros = twice(places + 16);
    const uint8_t* records = records_of<F, K>(unit, t) + 2 * F::kRecord * half;
    __m256i record, last;  // a record in each lane; its scale in the upper half of each dword
    if (F::kBits == 3) {
        const __m256i spread = _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5);
        const __m256i six = _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0);
        record =
            _mm256_permutevar8x32_epi32(_mm256_maskload_epi32((const int*)records, six), spread);
        last = _mm256_shuffle_epi32(record, 0xaa);
    } else {
        const __m128i three = _mm_setr_epi32(-1, -1, -1, 0);
        const __m128i first = _mm_maskload_epi32((const int*)records, three);
        record = _mm256_setr_m128i(first, _mm_srli_si128(first, F::kRecord));
        last = _mm256_shuffle_epi32(_mm256_slli_epi32(record, 16), 0x55);
    }
    *table = _mm256_or_si256(_mm256_shuffle_epi8(record, entries), zeros);
    *scale = _mm256_castsi256_ps(_mm256_and_si256(last, _mm256_set1_epi32((int)0xffff0000)));
}

T256 INLINE __m256i merged_256(__m256i low, __m256i rest) {
    const __m256i three = _mm256_set1_epi8(3);
    return _mm256_or_si256(_mm256_and_si256(low, three), _mm256_andnot_si256(three, rest));
}

// Codes of columns 16k .. 16k + 15, a byte each.
template <class F>
T256 INLINE __m256i code_256(int k, __m256i A, __m256i B, __m256i C) {
    if (F::kBits == 2)
        return _mm256_and_si256(_mm256_srli_epi16(k < 4 ? A : B, 2 * (k % 4)), _mm256_set1_epi8(3));
    const __m256i plane = k < 2 ? A : k < 4 ? B : C, seven = _mm256_set1_epi8(7);
    if (k < 6) return _mm256_and_si256(k % 2 ? _mm256_srli_epi16(plane, 3) : plane, seven);
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(k == 6 ? A : B, 6), _mm256_set1_epi8(3));
    const __m256i high = k == 6 ? _mm256_srli_epi16(C, 4) : _mm256_srli_epi16(C, 5);
    return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(4)));
}

// 32 levels of R halves times the activations of their 16 columns. VNNI: int8 planes. AVX2: int16,
// levels of even and odd columns apart; 255 * 32512 * 128 < 2^31.
template <bool VNNI, int R>
T256 INLINE void dot_256(__m256i* sum, const __m256i* w, const int8_t* x) {
    const __m256i first = twice(x);
    if (VNNI) {
        // the VEX form, spelled out: its intrinsic needs a target that AVX2 code cannot inline
        for (int r = 0; r < R; r++)
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[r]) : "x"(w[r]), "x"(first));
        return;
    }
    const __m256i second = twice(x + 16);
    for (int r = 0; r < R; r++) {
        const __m256i even = _mm256_and_si256(w[r], _mm256_set1_epi16(255));
        const __m256i odd = _mm256_srli_epi16(w[r], 8);
        sum[r] = _mm256_add_epi32(sum[r], _mm256_add_epi32(_mm256_madd_epi16(even, first),
                                                           _mm256_madd_epi16(odd, second)));
    }
}

// R pairs of rows of a unit, i and on, with G vectors. SALIENT = false: no column is.
template <class F, bool VNNI, bool SALIENT, int P, int K, int R, int G>
T256 INLINE void rows_256(const Job& j, const uint8_t* unit, const uint8_t* ahead, int i,
                          int64_t b, int m, __m256 (*sums)[G]) {
    constexpr int planes = VNNI ? P : 1, size = values_of(VNNI ? PLANES : WORDS, P);
    constexpr int step = VNNI ? 16 : 32;
    const int64_t at = b * j.batch + m;
    const int8_t* x = j.acts.values + at * size;
    constexpr int asks = F::kBits == 3 ? 2 : 1;  // lines to ask for, for each pair of rows
    const uint8_t* flags = j.flags + b * kBlock;
    ahead += asks * i * kPlane;
    __m256i A[R], B[R], C[R], table[R], sum[planes][G][R];
    __m256 scale[R];
    for (int r = 0; r < R; r++) {
        constexpr int count = F::template kPlanes<K>;
        const uint8_t* codes = planes_of<F, K>(unit, i / 2) + 32 * (i % 2 + r);
        A[r] = _mm256_loadu_si256((const __m256i*)codes);
        B[r] = count > 1 ? _mm256_loadu_si256((const __m256i*)(codes + kPlane)) : A[r];
        C[r] = count > 2 ? _mm256_loadu_si256((const __m256i*)(codes + 2 * kPlane)) : A[r];
        records_256<F, K>(unit, i / 2, i % 2 + r, j.shape.places, table + r, scale + r);
        for (int g = 0; g < G; g++) {
            sum[0][g][r] = _mm256_setzero_si256();
            sum[planes - 1][g][r] = twice(j.acts.start + 4 * (at + g));
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        stay();
        if (k % (8 / (asks * R)) == 0) ask_for(ahead + k / (8 / (asks * R)) * kPlane);
        __m256i w[R];
        for (int r = 0; r < R; r++) {
            __m256i index = code_256<F>(k, A[r], B[r], C[r]);
            if (SALIENT) index = _mm256_or_si256(index, twice(flags + 16 * k));
            w[r] = _mm256_shuffle_epi8(table[r], index);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
            for (int p = 0; p < planes; p++)
                dot_256<VNNI, R>(sum[p][g], w, x + g * size + p * kBlock + step * k);
    }
    for (int g = 0; g < G; g++)
        for (int r = 0; r < R; r++) {
            __m256i s = sum[0][g][r];
            if (planes == 2) s = _mm256_add_epi32(_mm256_slli_epi32(s, 8), sum[planes - 1][g][r]);
            sums[r][g] = _mm256_fmadd_ps(
                _mm256_cvtepi32_ps(s), _mm256_mul_ps(scale[r], _mm256_set1_ps(j.acts.scale[at + g])),
                sums[r][g]);
        }
}

template <class F, bool VNNI, bool SALIENT, int P, int K, int R, int G>
T256 INLINE void units_256(const Job& j, const uint8_t* unit, int n, int64_t b, int m,
                           __m256 (*sums)[2 * kTiles][G]) {
    for (int s = 0; s < n; s++, unit += j.shape.stride)
        for (int i = 0; i < 2 * kTiles; i += R)
            rows_256<F, VNNI, SALIENT, P, K, R, G>(j, unit, ahead_of<F>(j.shape, unit, b, n), i, b,
                                                   m, sums[s] + i);
}

template <class F, bool VNNI, bool SALIENT, int P, int R, int G>
T256 INLINE void group_256(const Job& j, int64_t strip, int n, int m) {
    constexpr int pairs = 2 * kTiles;
    __m256 sums[kStreams][pairs][G];
    for (int i = 0; i < n * pairs; i++)
        for (int g = 0; g < G; g++) sums[i / pairs][i % pairs][g] = _mm256_setzero_ps();
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += F::template kUnit<8>)
        units_256<F, VNNI, SALIENT, P, 8, R, G>(j, unit, n, b, m, sums);
    if (j.shape.half) units_256<F, VNNI, SALIENT, P, 4, R, G>(j, unit, n, j.shape.full, m, sums);
    for (int i = 0; i < n * pairs; i++)
        for (int g = 0; g < G; g++) {
            float lanes[8], rows[2];
            _mm256_storeu_ps(lanes, sums[i / pairs][i % pairs][g]);
            for (int k = 0; k < 2; k++)
                rows[k] = (lanes[4 * k] + lanes[4 * k + 1]) + (lanes[4 * k + 2] + lanes[4 * k + 3]);
            store_sums(j, strip * kTiles + i / 2, m + g, rows, 2 * (i % 2), 2);
        }
}

template <class F, bool VNNI, bool SALIENT, int P>
T256 void strips_256(const Job& j, int64_t strip, int n) {
    int m = 0;
    for (; m + 4 <= j.batch; m += 4) group_256<F, VNNI, SALIENT, P, 1, 4>(j, strip, n, m);
    for (; m + 2 <= j.batch; m += 2) group_256<F, VNNI, SALIENT, P, 1, 2>(j, strip, n, m);
    if (m < j.batch) group_256<F, VNNI, SALIENT, P, 2, 1>(j, strip, n, m);
}

#endif
// ---- ARM ---------------------------------------------------------------------------------------
#if defined(__aarch64__)

INLINE int32x4_t dot_neon(int32x4_t sum, int8x16_t w, int8x16_t x) {
    int16x8_t pairs = vmull_s8(vget_low_s8(w), vget_low_s8(x));  // two products: <= 2 * 128 * 127
    pairs = vmlal_s8(pairs, vget_high_s8(w), vget_high_s8(x));
    return vpadalq_s16(sum, pairs);
}

INLINE int32x4_t dot_armv82(int32x4_t sum, int8x16_t w, int8x16_t x) {
    // spelled out: its intrinsic needs a target that ordinary code cannot inline
    __asm__(".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}

// Codes of columns 16k .. 16k + 15; `k` is known when this is compiled.
template <class F>
INLINE uint8x16_t code_neon(int k, uint8x16_t A, uint8x16_t B, uint8x16_t C) {
    const uint8x16_t three = vdupq_n_u8(3), seven = vdupq_n_u8(7), four = vdupq_n_u8(4);
    if (F::kBits == 2) {
        const uint8x16_t plane = k < 4 ? A : B;
        switch (k % 4) {
            case 0: return vandq_u8(plane, three);
            case 1: return vandq_u8(vshrq_n_u8(plane, 2), three);
            case 2: return vandq_u8(vshrq_n_u8(plane, 4), three);
            default: return vshrq_n_u8(plane, 6);
        }
    }
    switch (k) {
        case 0: return vandq_u8(A, seven);
        case 1: return vandq_u8(vshrq_n_u8(A, 3), seven);
        case 2: return vandq_u8(B, seven);
        case 3: return vandq_u8(vshrq_n_u8(B, 3), seven);
        case 4: return vandq_u8(C, seven);
        case 5: return vandq_u8(vshrq_n_u8(C, 3), seven);
        case 6: return vorrq_u8(vshrq_n_u8(A, 6), vandq_u8(vshrq_n_u8(C, 4), four));
        default: return vorrq_u8(vshrq_n_u8(B, 6), vandq_u8(vshrq_n_u8(C, 5), four));
    }
}

template <class F, bool DOT, int P, int K, int G>
INLINE void row_neon(const Job& j, const uint8_t* unit, int i, int64_t b, int m,
                     float32x4_t* sums) {
    stay();
    const int t = i / kRows, r = i % kRows;
    const int64_t at = b * j.batch + m;
    const int8_t* x = j.acts.values + at * P * kBlock;
    const uint8_t *flags = j.flags + b * kBlock, *places = j.shape.places;
    const uint8_t* record = records_of<F, K>(unit, t) + r * F::kRecord;
    const uint8_t* planes = planes_of<F, K>(unit, t) + 16 * r;
    uint8_t own[16] = {0};
    memcpy(own, record, F::kRecord);
    const uint8x16_t table = veorq_u8(
        vorrq_u8(vqtbl1q_u8(vld1q_u8(own), vld1q_u8(places)), vld1q_u8(places + 16)), vdupq_n_u8(128));
    constexpr int count = F::template kPlanes<K>;
    const uint8x16_t A = vld1q_u8(planes), B = count > 1 ? vld1q_u8(planes + kPlane) : A;
    const uint8x16_t C = count > 2 ? vld1q_u8(planes + 2 * kPlane) : A;
    int32x4_t high[G], low[G];
    for (int g = 0; g < G; g++) high[g] = low[g] = vdupq_n_s32(0);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        const uint8x16_t code = code_neon<F>(k, A, B, C);
        const int8x16_t w = vreinterpretq_s8_u8(
            vqtbl1q_u8(table, vorrq_u8(code, vld1q_u8(flags + 16 * k))));
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const int8_t* at_k = x + g * P * kBlock + 16 * k;
            const int8x16_t hi = vld1q_s8(at_k);
            high[g] = DOT ? dot_armv82(high[g], w, hi) : dot_neon(high[g], w, hi);
            if (P == 2) {
                const int8x16_t lo = vld1q_s8(at_k + kBlock);
                low[g] = DOT ? dot_armv82(low[g], w, lo) : dot_neon(low[g], w, lo);
            }
        }
    }
    const float scale = record_scale<F>(record);
    for (int g = 0; g < G; g++) {
        const int32x4_t sum = P == 2 ? vaddq_s32(vshlq_n_s32(high[g], 8), low[g]) : high[g];
        sums[g] = vfmaq_n_f32(sums[g], vcvtq_f32_s32(sum), scale * j.acts.scale[at + g]);
    }
}

template <class F, bool DOT, int P, int G>
INLINE void group_neon(const Job& j, int64_t strip, int m) {
    constexpr int rows = kTiles * kRows;
    float32x4_t sums[rows][G];
    for (int i = 0; i < rows; i++)
        for (int g = 0; g < G; g++) sums[i][g] = vdupq_n_f32(0);
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += F::template kUnit<8>)
        for (int i = 0; i < rows; i++) row_neon<F, DOT, P, 8, G>(j, unit, i, b, m, sums[i]);
    for (int i = 0; i < rows && j.shape.half; i++)
        row_neon<F, DOT, P, 4, G>(j, unit, i, j.shape.full, m, sums[i]);
    for (int i = 0; i < rows; i++)
        for (int g = 0; g < G; g++) {
            const float sum = vaddvq_f32(sums[i][g]);
            store_sums(j, strip * kTiles + i / kRows, m + g, &sum, i % kRows, 1);
        }
}

// One strip after the other: side by side has not been measured on ARM.
template <class F, bool DOT, int P>
void strips_neon(const Job& j, int64_t first, int n) {
    for (int64_t strip = first; strip < first + n; strip++) {
        int m = 0;
        for (; m + 4 <= j.batch; m += 4) group_neon<F, DOT, P, 4>(j, strip, m);
        for (; m + 2 <= j.batch; m += 2) group_neon<F, DOT, P, 2>(j, strip, m);
        if (m < j.batch) group_neon<F, DOT, P, 1>(j, strip, m);
    }
}

#endif
// ---- dispatch ----------------------------------------------------------------------------------

// Multiply `n` strips (16 rows each) with all vectors: their codes come from memory once.
typedef void (*Strips)(const Job&, int64_t first, int n);

template <class F, int P>
Strips strips_of(int isa, [[maybe_unused]] bool salient) {
    constexpr bool maybe [[maybe_unused]] = F::kBits == 3;  // B2 has no salient columns
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return salient ? strips_256<F, false, maybe, P> : strips_256<F, false, false, P>;
        case AVXVNNI: return salient ? strips_256<F, true, maybe, P> : strips_256<F, true, false, P>;
        case AVX512: return strips_512<F, P>;
#if defined(HAS_AMX)
        case AMX: return strips_amx<F, P>;
#endif
#endif
#if defined(__aarch64__)
        case NEON: return strips_neon<F, false, P>;
        case NEONDOT: return strips_neon<F, true, P>;
#endif
        default: return strips_portable<F, P>;
    }
}

// Below about 50 kB a second thread costs more than it saves.
int threads_worth(const Job& j, int threads) {
    const int64_t worth = j.shape.strips * j.shape.stride * j.batch / 50000;
    return threads <= worth ? threads : worth < 1 ? 1 : (int)worth;
}

template <int P>
void multiply(const Job& j, int isa, int threads) {
    const Strips multiply_strips = j.shape.bits == 2 ? strips_of<B2, P>(isa, false)
                                                     : strips_of<B3, P>(isa, j.shape.salient);
    const int64_t strips = j.shape.strips;
    threads = threads_worth(j, threads);
    // fewer side by side where threads would go without, or the last ones end late
    int64_t side = strips / (4 * threads);
    side = side < 1 ? 1 : side < kStreams ? side : kStreams;
    const int64_t groups = (strips + side - 1) / side;
    int64_t chunk = groups / (8 * threads);
    chunk = chunk < 1 ? 1 : chunk;
#pragma omp parallel for schedule(guided, chunk) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < groups; i++) {
        const int64_t first = i * side, left = strips - first;
        multiply_strips(j, first, (int)(left < side ? left : side));
    }
}

#if defined(__x86_64__)
// The same code, compiled for wider registers.
template <Order ORDER, int P, class T>
T256 void quantise_256(const Shape& s, const T* x, int batch, int8_t* values, float* scale,
                       int32_t* start) {
    quantise_all<ORDER, P>(s, x, batch, values, scale, start);
}
#endif

template <int P, class T>
void quantise([[maybe_unused]] int isa, const Shape& s, const T* x, int batch, int8_t* values,
              float* scale, int32_t* start) {
#if defined(__x86_64__)
    if (isa == AVX2) return quantise_256<WORDS, P>(s, x, batch, values, scale, start);
    if (isa == AMX) return quantise_256<SQUARES, P>(s, x, batch, values, scale, start);
    if (isa != PORTABLE) return quantise_256<PLANES, P>(s, x, batch, values, scale, start);
#endif
    quantise_all<PLANES, P>(s, x, batch, values, scale, start);
}

template <int P>
void linear(Job& j, const void* x, int dtype, int isa, int threads, int8_t* values, float* scale,
            int32_t* start) {
    if (isa == AMX && j.batch < kSquareBatch) isa = AVX512;
    if (dtype == BFLOAT16)
        quantise<P>(isa, j.shape, (const uint16_t*)x, j.batch, values, scale, start);
    else
        quantise<P>(isa, j.shape, (const float*)x, j.batch, values, scale, start);
    j.acts = Acts{values, scale, start};
    multiply<P>(j, isa, threads);
}

// ---- dense panels ------------------------------------------------------------------------------

INLINE void store_value(float* out, float value) { *out = value; }
INLINE void store_value(uint16_t* out, float value) { *out = to_bfloat16(value); }

// n columns of row r of tile t, in one block; fewer than 16 K at the end of the matrix.
template <class F, int K, class T>
INLINE void dense_row(const uint8_t* unit, const uint8_t* places, const uint8_t* flags, int t,
                      int r, int n, T* out) {
    const uint8_t* record = records_of<F, K>(unit, t) + r * F::kRecord;
    const float scale = record_scale<F>(record);
    int8_t levels[16];
    T values[16];
    level_table(record, places, levels);
    for (int i = 0; i < 16; i++) store_value(values + i, (float)levels[i] * scale);
    uint8_t index[16];
    for (int k = 0; 16 * k < n; k++) {
        decode_codes<F>(planes_of<F, K>(unit, t), r, k, index);
        const int left = n - 16 * k < 16 ? n - 16 * k : 16;
        for (int i = 0; i < left; i++) out[16 * k + i] = values[index[i] | flags[16 * k + i]];
    }
}

#if defined(__x86_64__)
constexpr int kPiece = 32;  // columns of a row that are decoded at a time

// Where the level of each weight of a row stands in its table, 32 columns in each of K / 2 registers.
template <class F, int K>
T256 INLINE void row_index_256(const uint8_t* planes, const uint8_t* flags, __m256i* index) {
    if constexpr (F::kBits == 2) {
        for (int i = 0; i < K / 2; i++) {
            const __m256i by = i % 2 ? _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6)
                                     : _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
            index[i] = _mm256_and_si256(_mm256_srlv_epi32(twice(planes + i / 2 * kPlane), by),
                                        _mm256_set1_epi8(3));
        }
        return;
    }
    const __m256i by_three = _mm256_setr_epi32(0, 0, 0, 0, 3, 3, 3, 3);
    const __m256i A = twice(planes), B = twice(planes + kPlane);
    index[0] = _mm256_srlv_epi32(A, by_three);
    index[1] = _mm256_srlv_epi32(B, by_three);
    if (K == 8) {
        const __m256i C = twice(planes + 2 * kPlane);
        index[2] = _mm256_srlv_epi32(C, by_three);
        index[3] = merged_256(_mm256_srli_epi32(_mm256_blend_epi32(A, B, 0xf0), 6),
                              _mm256_srlv_epi32(C, _mm256_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5)));
    }
    for (int i = 0; i < K / 2; i++)
        index[i] = _mm256_or_si256(_mm256_and_si256(index[i], _mm256_set1_epi8(7)),
                                   _mm256_loadu_si256((const __m256i*)(flags + 32 * i)));
}

// The int8 level table of one row.
template <class F>
T256 INLINE __m128i row_levels(const uint8_t* record, const uint8_t* places) {
    const __m128i entries = _mm_load_si128((const __m128i*)places);
    const __m128i zeros = _mm_load_si128((const __m128i*)(places + 16));
    __m128i bytes;  // put together in a register, from no more than the record
    if (F::kBits == 3) {
        int32_t last;
        memcpy(&last, record + 8, 4);
        bytes = _mm_insert_epi32(_mm_loadl_epi64((const __m128i*)record), last, 2);
    } else {
        int32_t first;
        int16_t last;
        memcpy(&first, record, 4);
        memcpy(&last, record + 4, 2);
        bytes = _mm_insert_epi16(_mm_cvtsi32_si128(first), last, 2);
    }
    return _mm_xor_si128(_mm_or_si128(_mm_shuffle_epi8(bytes, entries), zeros),
                         _mm_set1_epi8(-128));
}

// Eight levels times their scale.
T256 INLINE __m256 values_256(__m128i levels, float scale) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels)), _mm256_set1_ps(scale));
}

// As bfloat16 in the upper half of each dword: rounded to nearest even, as torch does.
T256 INLINE __m256i rounded_256(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// A row's values as torch wants them, by type.
template <class T>
struct Row256;

template <>
struct Row256<float> {
    __m256i levels;
    float scale;
    T256 INLINE Row256(__m128i table, float s)
        : levels(_mm256_broadcastsi128_si256(table)), scale(s) {}
    T256 INLINE void place(__m256i index, float* out) const {
        int8_t w[32];
        _mm256_storeu_si256((__m256i*)w, _mm256_shuffle_epi8(levels, index));
        for (int i = 0; i < 32; i += 8)
            _mm256_storeu_ps(out + i,
                             values_256(_mm_loadl_epi64((const __m128i*)(w + i)), scale));
    }
};

template <>
struct Row256<uint16_t> {
    __m256i low, high;  // bytes of the 16 values
    T256 INLINE Row256(__m128i table, float scale) {
        const __m256i words = _mm256_permute4x64_epi64(
            _mm256_packus_epi32(
                _mm256_srli_epi32(rounded_256(values_256(table, scale)), 16),
                _mm256_srli_epi32(rounded_256(values_256(_mm_srli_si128(table, 8), scale)), 16)),
            0xd8);
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)),
                                _mm256_srli_epi16(words, 8)),
            0xd8);
        low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
    }
    T256 INLINE void place(__m256i index, uint16_t* out) const {
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
        _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i*)(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
};

// As bfloat16 in each dword.
T512 INLINE __m512i rounded_512(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_set1_epi32(_mm512_srli_epi32(even, 16),
                                  _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), 0x7fc0);
}

// Wider: one lookup for 16 values of float32, or for 32 of bfloat16.
template <class T>
struct Row512;

template <>
struct Row512<float> {
    __m512 values;
    T512 INLINE Row512(__m128i table, float scale)
        : values(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(table)),
                               _mm512_set1_ps(scale))) {}
    T512 INLINE void place(__m256i index, float* out) const {
        for (int i = 0; i < 2; i++) {
            const __m128i half = i ? _mm256_extracti128_si256(index, 1)
                                   : _mm256_castsi256_si128(index);
            _mm512_storeu_ps(out + 16 * i,
                             _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(half), values));
        }
    }
};

template <>
struct Row512<uint16_t> {
    __m512i values;
    T512 INLINE Row512(__m128i table, float scale) {
        values = _mm512_castsi256_si512(
            _mm512_cvtepi32_epi16(rounded_512(Row512<float>(table, scale).values)));
    }
    T512 INLINE void place(__m256i index, uint16_t* out) const {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(index), values));
    }
};

template <class F, class Row, int K, class T>
T256 INLINE void dense_row_256(const uint8_t* unit, const uint8_t* places, const uint8_t* flags, int t,
                               int r, T* out) {
    const uint8_t* record = records_of<F, K>(unit, t) + r * F::kRecord;
    const Row row(row_levels<F>(record, places), record_scale<F>(record));
    __m256i index[4];
    row_index_256<F, K>(planes_of<F, K>(unit, t) + 16 * r, flags, index);
    for (int i = 0; i < K / 2; i++) row.place(index[i], out + 32 * i);
}

// The same with the other target; `Row`'s functions are only inlined into their own.
template <class F, class Row, int K, class T>
T512 INLINE void dense_row_512(const uint8_t* unit, const uint8_t* places, const uint8_t* flags, int t,
                               int r, T* out, int64_t apart = kPiece) {
    const uint8_t* record = records_of<F, K>(unit, t) + r * F::kRecord;
    const Row row(row_levels<F>(record, places), record_scale<F>(record));
    __m256i index[4];
    row_index_256<F, K>(planes_of<F, K>(unit, t) + 16 * r, flags, index);
    for (int i = 0; i < K / 2; i++) row.place(index[i], out + apart * i);
}

// Whole units by `fast`, what is left of a unit by plain code.
#define DENSE_ROW(fast, Row)                                                                    \
    for (int64_t b = 0; b < s.full; b++, unit += F::template kUnit<8>) {                         \
        const int64_t left = s.cols - b * kBlock;                                               \
        if (left >= kBlock) fast<F, Row<T>, 8>(unit, s.places, flags, t, r, out);               \
        else dense_row<F, 8>(unit, s.places, flags, t, r, (int)left, out);                      \
        flags += kBlock, out += kBlock;                                                         \
    }                                                                                           \
    const int64_t left = s.cols - s.full * kBlock;                                              \
    if (s.half && left == kBlock / 2) fast<F, Row<T>, 4>(unit, s.places, flags, t, r, out);     \
    else if (s.half) dense_row<F, 4>(unit, s.places, flags, t, r, (int)left, out)

template <class F, class T>
T256 void dense_256(const Shape& s, const uint8_t* unit, const uint8_t* flags, int t, int r,
                    T* out) {
    DENSE_ROW(dense_row_256, Row256);
}

template <class F, class T>
T512 void dense_512(const Shape& s, const uint8_t* unit, const uint8_t* flags, int t, int r,
                    T* out) {
    DENSE_ROW(dense_row_512, Row512);
}
#undef DENSE_ROW
#endif

template <class F, class T>
INLINE void dense_any(const Shape& s, const uint8_t* unit, const uint8_t* flags, int t, int r,
                      T* out) {
    for (int64_t b = 0; b < s.full; b++, unit += F::template kUnit<8>) {
        const int64_t left = s.cols - b * kBlock;
        dense_row<F, 8>(unit, s.places, flags, t, r, left < kBlock ? (int)left : kBlock, out);
        flags += kBlock, out += kBlock;
    }
    if (s.half)
        dense_row<F, 4>(unit, s.places, flags, t, r, (int)(s.cols - s.full * kBlock), out);
}

template <class F, class T>
void dense(const Shape& s, const uint8_t* tiles, const uint8_t* flags, int64_t row0, int64_t row1,
           T* out, [[maybe_unused]] int isa, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1)
    for (int64_t row = row0; row < row1; row++) {
        const uint8_t* unit = tiles + row / (kTiles * kRows) * s.stride;
        const int t = (int)(row / kRows % kTiles), r = (int)(row % kRows);
        T* to = out + (row - row0) * s.cols;
#if defined(__x86_64__)
        if (isa == AVX512 || isa == AMX) dense_512<F>(s, unit, flags, t, r, to);
        else if (isa != PORTABLE) dense_256<F>(s, unit, flags, t, r, to);
        else dense_any<F>(s, unit, flags, t, r, to);
#else
        dense_any<F>(s, unit, flags, t, r, to);
#endif
    }
}

#if defined(HAS_AMX)
// ---- prompts: many bfloat16 vectors with AMX -----------------------------------------------------
//
// As torch would do it with the dense matrix: weights rounded to bfloat16, sums in float32. A tile of
// weights is a piece of 16 rows, as decoded; one of vectors has two columns of sixteen vectors in a
// row. 32 rows of weights are multiplied with 32 vectors at a time, `kDepth` blocks of columns deep,
// so that the rows stay in the first cache, and in the second what `kPromptVectors` vectors have in
// these columns and their sums with `kPromptRows` rows.

constexpr int kDepth = 2, kPromptRows = 512, kPromptVectors = 512;
constexpr int64_t kPromptCols = 1 << 24;  // with more, how far vectors are apart would not fit an int
constexpr int kTile = 512, kSums = 256;  // values of a tile of bfloat16; of sums
constexpr int kBlockPieces = kBlock / kPiece;

// Sums of two strips with all vectors: for each pair of sixteens, even where the second is missing,
// tiles of 16 rows x 16 vectors, two of the first strip, then two of the second.
constexpr int64_t sums_of(int64_t sixteens) { return (sixteens + 1) / 2 * 4 * kSums; }

struct Prompt {
    const Job& job;
    const uint16_t* from;  // (batch, cols)
    uint16_t* to;          // (batch, rows)
    uint16_t* vectors;     // tiles (sixteens, pieces)
    int64_t sixteens, pieces;
};

// A tile of vectors: sixteen of them from number m on, 32 columns.
TAMX void pack_vectors(const Prompt& p, int64_t m, int64_t piece, uint16_t* out) {
    const int64_t cols = p.job.shape.cols, column = piece * kPiece;
    const int64_t there = p.job.batch - m < 16 ? p.job.batch - m : 16;
    const int64_t width = cols - column < kPiece ? cols - column : kPiece;
    alignas(64) uint16_t edge[kTile];
    const uint16_t* from = p.from + m * cols + column;
    int64_t apart = cols;
    if (there < 16 || width < kPiece) {
        memset(edge, 0, sizeof edge);
        for (int64_t i = 0; i < there && width > 0; i++)
            memcpy(edge + i * kPiece, from + i * cols, (size_t)width * 2);
        from = edge, apart = kPiece;
    }
    const __m512i down = multiples_of((int)(2 * apart));
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(out + 32 * i, _mm512_i32gather_epi32(down, from + 2 * i, 1));
}

// Blocks b0 .. b1 - 1 of two strips as tiles, those of the strips taking turns.
template <class F>
TAMX INLINE void decode_pair(const Job& j, int64_t strip, int64_t b0, int64_t b1, uint16_t* out) {
    const Shape& s = j.shape;
    for (int64_t i = 0; i < 2 && strip + i < s.strips; i++) {
        const uint8_t* unit = j.tiles + (strip + i) * s.stride + b0 * F::template kUnit<8>;
        for (int64_t b = b0; b < b1; b++, unit += F::template kUnit<8>) {
            uint16_t* to = out + ((b - b0) * kBlockPieces * 2 + i) * kTile;
            for (int row = 0; row < kTiles * kRows; row++) {
                const int t = row / kRows, r = row % kRows;
                // every second line of the next pair's unit: the processor takes them by twos
                if (row % 2 == 0) ask_for(unit + 2 * s.stride + row * kPlane);
                if (b < s.full)
                    dense_row_512<F, Row512<uint16_t>, 8>(unit, s.places, j.flags + b * kBlock, t, r,
                                                          to + row * kPiece, 2 * kTile);
                else
                    dense_row_512<F, Row512<uint16_t>, 4>(unit, s.places, j.flags + b * kBlock, t, r,
                                                          to + row * kPiece, 2 * kTile);
            }
        }
    }
}

// `count` pieces of two strips with sixteen vectors or, V = 2, with two sixteens `next` apart, added to
// their four tiles of `sums`; `begin`: there are no sums yet.
template <int V>
TAMX INLINE void multiply_pieces(const uint16_t* weights, const uint16_t* vectors, int64_t next,
                                 int64_t count, bool begin, float* sums) {
    stay();
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        if (V == 2) _tile_zero(2);
        if (V == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 2 * kSums, 64);
        if (V == 2) _tile_loadd(2, sums + kSums, 64);
        if (V == 2) _tile_loadd(3, sums + 3 * kSums, 64);
    }
    for (int64_t k = 0; k < count; k++) {
        _tile_loadd(6, vectors + k * kTile, 64);
        _tile_loadd(4, weights + k * 2 * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, weights + (k * 2 + 1) * kTile, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (V == 2) {
            _tile_loadd(7, vectors + next + k * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 2 * kSums, 64);
    if (V == 2) _tile_stored(2, sums + kSums, 64);
    if (V == 2) _tile_stored(3, sums + 3 * kSums, 64);
    stay();
}

// Sums of sixteen rows with sixteen vectors from number m on, rounded and put where they belong.
TAMX INLINE void store_rounded(const Prompt& p, int64_t row, int64_t m, const float* sums) {
    const int64_t rows = p.job.shape.rows;
    const __mmask16 there = first_of(rows - row);
    const __m512i down = multiples_of(16);
    for (int64_t i = 0; i < 16 && m + i < p.job.batch; i++) {
        const __m512i rounded = rounded_512(_mm512_i32gather_ps(down, sums + i, 4));
        _mm512_mask_cvtepi32_storeu_epi16(p.to + (m + i) * rows + row, there, rounded);
    }
}

// Strips first .. last - 1 with all vectors. `weights` has room for two strips `kDepth` blocks deep,
// `sums` for whole pairs of strips.
template <class F>
TAMX void multiply_rows(const Prompt& p, int64_t first, int64_t last, uint16_t* weights, float* sums) {
    const Job& j = p.job;
    const int64_t blocks = j.shape.blocks(), pair = sums_of(p.sixteens);
    load_tile_shapes();
    for (int64_t b0 = 0; b0 < blocks; b0 += kDepth) {
        const int64_t b1 = b0 + kDepth < blocks ? b0 + kDepth : blocks, begin = b0 * kBlockPieces;
        const int64_t count = (b1 * kBlockPieces < p.pieces ? b1 * kBlockPieces : p.pieces) - begin;
        for (int64_t strip = first; strip < last; strip += 2) {
            decode_pair<F>(j, strip, b0, b1, weights);
            float* to = sums + (strip - first) / 2 * pair;
            for (int64_t g = 0; g < p.sixteens; g += 2) {
                const uint16_t* vectors = p.vectors + (g * p.pieces + begin) * kTile;
                const int64_t next = p.pieces * kTile;
                if (g + 1 < p.sixteens)
                    multiply_pieces<2>(weights, vectors, next, count, b0 == 0, to + g * 2 * kSums);
                else
                    multiply_pieces<1>(weights, vectors, next, count, b0 == 0, to + g * 2 * kSums);
            }
        }
    }
    _tile_release();
    for (int64_t strip = first; strip < last; strip++)
        for (int64_t g = 0; g < p.sixteens; g++) {
            const int64_t tile = g / 2 * 4 + (strip - first) % 2 * 2 + g % 2;
            store_rounded(p, strip * kTiles * kRows, 16 * g,
                          sums + (strip - first) / 2 * pair + tile * kSums);
        }
}

// All vectors of a job at once, bfloat16 `from` and `to`; false = out of memory.
template <class F>
bool multiply_part(const Job& j, const uint16_t* from, uint16_t* to, int threads) {
    threads = threads_worth(j, threads);
    const int64_t sixteens = sixteens_of(j.batch), pieces = j.shape.width() / kPiece;
    const int64_t strips = j.shape.strips, most = kPromptRows / (kTiles * kRows);
    const int64_t parts = threads * ((strips + threads * most - 1) / (threads * most));
    const int64_t each = ((strips + parts - 1) / parts + 1) / 2 * 2;  // strips of a part
    const int64_t packed = sixteens * pieces * kTile * 2;
    const int64_t decoded = 2 * kDepth * kBlockPieces * kTile;
    const int64_t own = decoded * 2 + each / 2 * sums_of(sixteens) * 4;
    void* room = nullptr;
    if (posix_memalign(&room, 64, (size_t)(packed + threads * own))) return false;
    const Prompt p = {j, from, to, (uint16_t*)room, sixteens, pieces};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num();
#else
        const int me = 0;
#endif
        uint16_t* weights = (uint16_t*)((char*)room + packed + me * own);
        float* sums = (float*)(weights + decoded);
#pragma omp for
        for (int64_t i = 0; i < sixteens * pieces; i++)
            pack_vectors(p, i / pieces * 16, i % pieces, p.vectors + i * kTile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < strips; first += each)
            multiply_rows<F>(p, first, first + each < strips ? first + each : strips, weights, sums);
    }
    free(room);
    return true;
}

// As many vectors at a time as the second cache has room for; false = out of memory.
bool multiply_prompt(Job& j, const uint16_t* from, uint16_t* to, int64_t batch, int threads) {
    for (int64_t m = 0; m < batch; m += kPromptVectors) {
        j.batch = (int)(batch - m < kPromptVectors ? batch - m : kPromptVectors);
        const uint16_t* x = from + m * j.shape.cols;
        uint16_t* y = to + m * j.shape.rows;
        const auto multiply = j.shape.bits == 2 ? multiply_part<B2> : multiply_part<B3>;
        if (!multiply(j, x, y, threads)) return false;
    }
    return true;
}

#endif

// ---- the read ceiling --------------------------------------------------------------------------

// Nothing but reads of whole cache lines, in independent sums. S streams of `part` words each are
// read side by side.
template <int S>
INLINE uint64_t read_all(const uint64_t* data, int64_t part) {
    constexpr int words = 64 / S;
    uint64_t sums[64] = {0}, sum = 0;
    for (int64_t i = 0; i + words <= part; i += words)
        for (int k = 0; k < 64; k++) sums[k] ^= data[k / words * part + i + k % words];
    for (int k = 0; k < 64; k++) sum ^= sums[k];
    return sum;
}

template <int S>
uint64_t read_portable(const uint64_t* data, int64_t part) {
    return read_all<S>(data, part);
}
#if defined(__x86_64__)
// Several streams are asked for where they go on, in the next chunk once this one ends, as the
// kernels do; a single one, left to the processor, is faster without.
template <int S>
INLINE void ask_for_stream(const uint64_t* line, int64_t i, int64_t part) {
    const int64_t ahead = kReadAhead + (i + kReadAhead < part ? 0 : (S - 1) * part);
    if (S > 1) ask_for((const uint8_t*)(line + ahead));
}

template <int S>
T256 uint64_t read_256(const uint64_t* data, int64_t part) {
    constexpr int lines = 8 / S;
    __m256i sums[16] = {};
    for (int64_t i = 0; i + 8 * lines <= part; i += 8 * lines)
        for (int k = 0; k < 8; k++) {
            const uint64_t* line = data + k / lines * part + i + 8 * (k % lines);
            ask_for_stream<S>(line, i, part);
            for (int h = 0; h < 2; h++)
                sums[2 * k + h] = _mm256_xor_si256(
                    sums[2 * k + h], _mm256_loadu_si256((const __m256i*)(line + 4 * h)));
        }
    uint64_t lanes[4], sum = 0;
    for (int k = 1; k < 16; k++) sums[0] = _mm256_xor_si256(sums[0], sums[k]);
    _mm256_storeu_si256((__m256i*)lanes, sums[0]);
    for (int k = 0; k < 4; k++) sum ^= lanes[k];
    return sum;
}

template <int S>
T512 uint64_t read_512(const uint64_t* data, int64_t part) {
    constexpr int lines = 8 / S;
    __m512i sums[8] = {};
    for (int64_t i = 0; i + 8 * lines <= part; i += 8 * lines)
        for (int k = 0; k < 8; k++) {
            const uint64_t* line = data + k / lines * part + i + 8 * (k % lines);
            ask_for_stream<S>(line, i, part);
            sums[k] = _mm512_xor_si512(sums[k], _mm512_loadu_si512(line));
        }
    uint64_t lanes[8], sum = 0;
    for (int k = 1; k < 8; k++) sums[0] = _mm512_xor_si512(sums[0], sums[k]);
    _mm512_storeu_si512(lanes, sums[0]);
    for (int k = 0; k < 8; k++) sum ^= lanes[k];
    return sum;
}
#endif

template <int S>
uint64_t read_words([[maybe_unused]] int isa, const uint64_t* data, int64_t words) {
#if defined(__x86_64__)
    if (isa == AVX512 || isa == AMX) return read_512<S>(data, words / S);
    if (isa != PORTABLE) return read_256<S>(data, words / S);
#endif
    return read_portable<S>(data, words / S);
}

}  // namespace

// ---- what Python calls -------------------------------------------------------------------------

// Version of this interface; native.py refuses another.
EXPORT int subbit_b3_version() { return 5; }

namespace {

#if defined(__x86_64__)
struct Cpuid {
    uint32_t a, b, c, d;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
    Cpuid r = {leaf, 0, subleaf, 0};
    __asm__("cpuid" : "+a"(r.a), "=b"(r.b), "+c"(r.c), "=d"(r.d));
    return r;
}

// What leaf 7 of the processor says; nothing where it has none.
Cpuid leaf_7(uint32_t subleaf) { return cpuid(0, 0).a < 7 ? Cpuid{0, 0, 0, 0} : cpuid(7, subleaf); }
#endif

#if defined(HAS_AMX)
// Whether the processor has AMX for int8 and bfloat16 and Linux lends this process its registers.
bool amx_allowed() {
    if ((leaf_7(0).d >> 22 & 13) != 13) return false;  // EDX: AMX-BF16, AMX-TILE and AMX-INT8
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
}
#endif

bool detect(int isa) {
    if (isa == PORTABLE) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == AVX2) return avx2;
    // EAX of subleaf 1: compilers name this feature only since gcc 11
    if (isa == AVXVNNI) return avx2 && (leaf_7(1).a >> 4 & 1);
#if defined(HAS_AMX)
    if (isa == AMX) return detect(AVX512) && amx_allowed();
#endif
    if (isa == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__aarch64__)
    if (isa == NEON) return 1;
#if defined(__ARM_FEATURE_DOTPROD)
    if (isa == NEONDOT) return 1;
#elif defined(__linux__)
    if (isa == NEONDOT) return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#endif
#endif
    return 0;
}

// Asking the processor traps in virtual machines, so it is asked once.
const struct Found {
    bool has[kIsas];
    Found() {
        for (int i = 0; i < kIsas; i++) has[i] = detect(i);
    }
} kFound;

}  // namespace

// Whether this processor (and this build) runs instruction set `isa`.
EXPORT int subbit_b3_supports(int isa) { return isa >= 0 && isa < kIsas && kFound.has[isa]; }

// What to multiply; every field has eight bytes.
struct Linear {
    const void* x;
    int64_t dtype, batch;
    const uint8_t* tiles;
    int64_t tile_bytes;
    const uint8_t* flags;
    int64_t flag_bytes, rows, cols;
    void* out;
    int64_t planes, isa, threads;
};

// out (batch, rows) = x (batch, cols) @ W^T, both of one type; planes 1 or 2.
// Returns 0; 1 = sizes that do not fit, 2 = out of memory, 3 = unknown instruction set.
EXPORT int subbit_b3_linear(const Linear* call) {
    const auto [x, dtype, batch, tiles, tile_bytes, flags, flag_bytes, rows, cols, out, planes, isa,
                threads] = *call;
    Job job;
    if (!make_shape(rows, cols, tile_bytes, flags, flag_bytes, &job.shape)) return 1;
    if (batch < 1 || (planes != 1 && planes != 2) || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    job.tiles = tiles, job.flags = flags;
#if defined(HAS_AMX)
    if (isa == AMX && dtype == BFLOAT16 && batch > 16 * kSquareGroups && cols <= kPromptCols)
        return multiply_prompt(job, (const uint16_t*)x, (uint16_t*)out, batch, (int)threads) ? 0 : 2;
#endif
    const int64_t limit = isa == AMX ? 16 * kSquareGroups : kMaxBatch;
    const int64_t most = batch < limit ? batch : limit, blocks = job.shape.blocks() * most;
    const int64_t plane_bytes = isa == AMX ? job.shape.blocks() * squares_of((int)most, planes)
                                           : blocks * values_of(isa == AVX2 ? WORDS : PLANES, planes);
    const int64_t out_bytes = dtype == BFLOAT16 ? most * rows * 4 : 0;
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, (size_t)(plane_bytes + blocks * 20 + out_bytes))) return 2;
    int8_t* values = (int8_t*)scratch;
    int32_t* start = (int32_t*)(values + plane_bytes);
    float* scale = (float*)(start + 4 * blocks);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4;
    for (int64_t m = 0; m < batch; m += most) {
        const void* from = (const char*)x + m * cols * size;
        void* to = (char*)out + m * rows * size;
        job.batch = (int)(batch - m < most ? batch - m : most);
        job.out = dtype == BFLOAT16 ? scale + blocks : (float*)to;
        if (planes == 2) linear<2>(job, from, dtype, isa, threads, values, scale, start);
        else linear<1>(job, from, dtype, isa, threads, values, scale, start);
        if (dtype == BFLOAT16)
            for (int64_t i = 0; i < job.batch * rows; i++) ((uint16_t*)to)[i] = to_bfloat16(job.out[i]);
    }
    free(scratch);
    return 0;
}

// Rows row0 .. row1 - 1 of W, dense, as float32 or bfloat16; returns as above.
EXPORT int subbit_b3_dense(const uint8_t* tiles, int64_t tile_bytes, const uint8_t* flags,
                           int64_t flag_bytes, int64_t rows, int64_t cols, int64_t row0,
                           int64_t row1, void* out, int dtype, int isa, int threads) {
    Shape shape;
    if (!make_shape(rows, cols, tile_bytes, flags, flag_bytes, &shape)) return 1;
    if (row0 < 0 || row0 > row1 || row1 > rows || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    const auto decode = [&](auto* to) {
        if (shape.bits == 2) dense<B2>(shape, tiles, flags, row0, row1, to, isa, threads);
        else dense<B3>(shape, tiles, flags, row0, row1, to, isa, threads);
    };
    if (dtype == BFLOAT16) decode((uint16_t*)out);
    else decode((float*)out);
    return 0;
}

// Read `bytes` bytes (whole chunks of 64 KiB), as one stream or several side by side, and return their
// xor: the measure of other kernels.
EXPORT uint64_t subbit_b3_read(const void* data, int64_t bytes, int several, int isa, int threads) {
    const int64_t chunk = 65536, chunks = bytes / chunk, words = chunk / 8;
    const auto read = several ? read_words<kStreams> : read_words<1>;
    uint64_t sum = 0;
    if (!subbit_b3_supports(isa) || threads < 1) return 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1) reduction(^ : sum)
    for (int64_t i = 0; i < chunks; i++)
        sum ^= read(isa, (const uint64_t*)data + i * words, words);
    return sum;
}

// Matrix products with weights in the B3 layout (layout.py says what the bytes mean).
//
// Activations become one or two int8 planes for each block of 128 columns: x = s (255 hi + lo), or
// s hi with one plane. A tile of 4 rows x 128 columns is decoded in registers, 16 columns of its
// rows at a time: shift, mask, look the int8 level up in the row's 16-entry table, integer dot
// product. Per block the integers are multiplied by the scales of row and activations. Several tiles
// and several vectors at once share the loads of activations and the decoded levels.
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
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

namespace {

enum Isa { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, NEON = 4, NEONDOT = 5 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };

constexpr int kBlock = 128;   // columns of a tile
constexpr int kRows = 4;      // rows of a tile
constexpr int kPlane = 64;    // bytes of one code plane of a tile
constexpr int kRecord = 12;   // bytes of one level record: 6 + 4 levels + 128, bfloat16 scale
constexpr int kTiles = 4;     // tiles of a unit: 16 rows x 128 columns
constexpr int kFull = kTiles * (3 * kPlane + kRows * kRecord);  // bytes of a unit
constexpr int kHalf = kTiles * (2 * kPlane + kRows * kRecord);  // of one of at most 64 columns
constexpr int kMaxBatch = 16;

struct Shape {
    int64_t rows, cols, full, strips, stride;
    bool half;
    int64_t blocks() const { return full + half; }
    int64_t width() const { return full * kBlock + (half ? kBlock / 2 : 0); }
};

bool make_shape(int64_t rows, int64_t cols, int64_t bytes, int64_t flag_bytes, Shape* s) {
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX) return false;
    const int64_t rest = cols % kBlock;
    s->rows = rows, s->cols = cols;
    s->half = rest > 0 && rest <= kBlock / 2;
    s->full = cols / kBlock + (rest > kBlock / 2);
    s->strips = (rows + kTiles * kRows - 1) / (kTiles * kRows);
    s->stride = s->full * kFull + (s->half ? kHalf : 0);
    return bytes == s->strips * s->stride && flag_bytes == s->width();
}

// Quantised activations. The batch is cut into groups of as many vectors as a kernel takes at once;
// a group of M vectors that starts at vector m0 has its own stretch of each array, m0 * blocks *
// (what one vector needs in a block) from the start, ordered so that a kernel reads straight on:
struct Acts {
    const int8_t* values;  // (blocks, 8, M, planes, 16)
    const float* scale;    // (blocks, M)
    const int32_t* start;  // (blocks, M, 4): -128 * sum of the block in the first of four
};

template <int P>
INLINE Acts group_of(const Acts& all, int64_t blocks, int m0) {
    return Acts{all.values + m0 * blocks * kBlock * P, all.scale + m0 * blocks,
                all.start + 4 * m0 * blocks};
}

struct Job {
    Shape shape;
    const uint8_t* tiles;
    const uint8_t* flags;  // (width): 0, or 8 in salient columns
    Acts acts;
    float* out;            // (batch, rows)
};

// In a unit with K groups of 16 columns: the code planes of tile `t`, and its level records.
template <int K>
INLINE const uint8_t* planes_of(const uint8_t* unit, int t) {
    return unit + t * (K == 8 ? 3 : 2) * kPlane;
}

template <int K>
INLINE const uint8_t* records_of(const uint8_t* unit, int t) {
    return unit + kTiles * (K == 8 ? 3 : 2) * kPlane + t * kRows * kRecord;
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

INLINE float record_scale(const uint8_t* record) {
    return bits_to_float((uint32_t)record[10] << 16 | (uint32_t)record[11] << 24);
}

// ---- activations -------------------------------------------------------------------------------

// Round to the nearest integer, for |v| < 2^22.
INLINE float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// `stride` is the distance of two 16-column chunks of one vector in `out`.
template <int P, class T>
INLINE void quantise_block(const T* x, int n, int8_t* out, int64_t stride, float* scale,
                           int32_t* start) {
    float value[kBlock] = {0};
    int8_t hi[kBlock], lo[kBlock];
    for (int i = 0; i < n; i++) value[i] = load_value(x, i);
    uint32_t top = 0;  // largest |x|: as bits, NaN is larger than Inf is larger than the rest
    for (int i = 0; i < kBlock; i++) {
        const uint32_t bits = float_to_bits(value[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    const float largest = bits_to_float(top);
    const float range = P == 2 ? 32512.0f : 127.0f;  // 255 * 127 + 127
    const bool finite = top < 0x7f800000;
    const bool usable = finite && largest >= 1e-30f;  // less counts as zero
    const float inverse = usable ? range / largest : 0.0f;
    *scale = usable ? largest / range : finite ? 0.0f : bits_to_float(0x7fc00000);
    int32_t sum = 0;
    for (int i = 0; i < kBlock; i++) {
        const float v = usable ? value[i] : 0.0f;
        const float q = nearest(v * inverse);
        const float h = P == 2 ? nearest(q * (1.0f / 255.0f)) : q;
        hi[i] = (int8_t)(int32_t)h;
        lo[i] = (int8_t)(int32_t)(q - 255.0f * h);
        sum += (int32_t)q;
    }
    for (int k = 0; k < kBlock / 16; k++) {
        memcpy(out + k * stride, hi + 16 * k, 16);
        if (P == 2) memcpy(out + k * stride + 16, lo + 16 * k, 16);
    }
    start[0] = -128 * sum;
    start[1] = start[2] = start[3] = 0;
}

template <int P, class T>
INLINE void quantise_group(const Shape& s, const T* x, int m0, int count, int8_t* values,
                           float* scale, int32_t* start) {
    const int64_t blocks = s.blocks();
    for (int m = 0; m < count; m++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t at = m0 * blocks + b * count + m, left = s.cols - b * kBlock;
            int8_t* out = values + (m0 * blocks + b * count) * kBlock * P + m * P * 16;
            quantise_block<P>(x + (m0 + m) * s.cols + b * kBlock,
                              left < kBlock ? (int)left : kBlock, out, count * P * 16, scale + at,
                              start + 4 * at);
        }
}

// ---- portable ----------------------------------------------------------------------------------

INLINE void store_sums(const Job& j, int64_t t, int m, const float* sums, int first, int count) {
    for (int r = 0; r < count; r++) {
        const int64_t row = t * kRows + first + r;
        if (row < j.shape.rows) j.out[m * j.shape.rows + row] = sums[r];
    }
}

// Three-bit codes of columns 16k .. 16k + 15 of one row of a tile.
INLINE void decode_codes(const uint8_t* tile, int r, int k, uint8_t* out) {
    const uint8_t *A = tile + 16 * r, *B = A + kPlane, *C = B + kPlane;
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

INLINE void level_table(const uint8_t* record, int8_t* table) {
    memset(table, 0, 16);
    for (int i = 0; i < 6; i++) table[1 + i] = (int8_t)(record[i] - 128);
    for (int i = 0; i < 4; i++) table[9 + i] = (int8_t)(record[6 + i] - 128);
}

template <int K>
INLINE void decode_row(const uint8_t* planes, const uint8_t* record, const uint8_t* flags, int r,
                       int8_t* out) {
    int8_t table[16];
    uint8_t index[16];
    level_table(record, table);
    for (int k = 0; k < K; k++) {
        decode_codes(planes, r, k, index);
        for (int j = 0; j < 16; j++) out[16 * k + j] = table[index[j] | flags[16 * k + j]];
    }
}

template <int P, int K>
INLINE void portable_block(const Acts& acts, const uint8_t* flags, const uint8_t* unit, int t,
                           int64_t b, int count, float (*sums)[kRows]) {
    for (int r = 0; r < kRows; r++) {
        int8_t w[kBlock];
        const uint8_t* record = records_of<K>(unit, t) + r * kRecord;
        decode_row<K>(planes_of<K>(unit, t), record, flags + b * kBlock, r, w);
        const float scale = record_scale(record);
        for (int m = 0; m < count; m++) {
            int32_t high = 0, low = 0;
            for (int k = 0; k < K; k++) {
                const int8_t* x = acts.values + ((b * 8 + k) * count + m) * P * 16;
                for (int i = 0; i < 16; i++) high += (int16_t)w[16 * k + i] * (int16_t)x[i];
                if (P == 2)
                    for (int i = 0; i < 16; i++) low += (int16_t)w[16 * k + i] * (int16_t)x[16 + i];
            }
            const int32_t sum = P == 2 ? 255 * high + low : high;
            sums[m][r] += (float)sum * (scale * acts.scale[b * count + m]);
        }
    }
}

template <int P>
void strip_portable(const Job& j, int64_t strip, int count) {
    for (int t = 0; t < kTiles; t++) {
        float sums[kMaxBatch][kRows] = {};
        const uint8_t* unit = j.tiles + strip * j.shape.stride;
        for (int64_t b = 0; b < j.shape.full; b++, unit += kFull)
            portable_block<P, 8>(j.acts, j.flags, unit, t, b, count, sums);
        if (j.shape.half)
            portable_block<P, 4>(j.acts, j.flags, unit, t, j.shape.full, count, sums);
        for (int m = 0; m < count; m++) store_sums(j, strip * kTiles + t, m, sums[m], 0, kRows);
    }
}

// ---- x86 ---------------------------------------------------------------------------------------
#if defined(__x86_64__)

#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define T256 __attribute__((target("avx2,fma")))

// How far ahead of the unit in work its successors are asked for, in bytes, into the second cache:
// asked for into the first, they hold up the loads (measured on Zen 4: half the speed).
constexpr int kAhead = 8 * kFull;

// What R tiles have to do with M vectors in one block, in registers.
template <int M, int P, int R>
struct Work512 {
    __m512i table[R], high[R][M], low[R][M];
};

// Multiply 16 columns of R tiles: `code` has their codes in the low three bits of each byte.
template <int M, int P, int R>
T512 INLINE void columns_512(Work512<M, P, R>& work, const __m512i* code, const uint8_t* flags,
                             const int8_t* values) {
    const __m512i flag = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)flags));
    __m512i w[R];
    for (int r = 0; r < R; r++)
        w[r] = _mm512_shuffle_epi8(
            work.table[r],
            _mm512_ternarylogic_epi32(code[r], _mm512_set1_epi8(7), flag, 0xea));  // c & 7 | flag
    for (int m = 0; m < M; m++) {
        const int8_t* x = values + m * P * 16;
        const __m512i hi = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x));
        for (int r = 0; r < R; r++)
            work.high[r][m] = _mm512_dpbusd_epi32(work.high[r][m], w[r], hi);
        if (P == 2) {
            const __m512i lo = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + 16)));
            for (int r = 0; r < R; r++)
                work.low[r][m] = _mm512_dpbusd_epi32(work.low[r][m], w[r], lo);
        }
    }
}

// Tiles t .. t + R - 1 of a unit. Planes are taken up one after the other, for want of registers.
template <int M, int P, int R, int K>
T512 INLINE void block_512(const Acts& acts, const uint8_t* flags, const uint8_t* unit, int t,
                           int64_t b, __m512 (*sums)[M]) {
    stay();
    const int8_t* values = acts.values + b * kBlock * M * P;
    const int32_t* starts = acts.start + 4 * b * M;
    flags += b * kBlock;
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i entries = _mm512_broadcast_i32x4(
        _mm_setr_epi8(-1, 0, 1, 2, 3, 4, 5, -1, -1, 6, 7, 8, 9, -1, -1, -1));
    const __m512i zeros = _mm512_broadcast_i32x4(
        _mm_setr_epi8(-128, 0, 0, 0, 0, 0, 0, -128, -128, 0, 0, 0, 0, -128, -128, -128));
    const __m512i three = _mm512_set1_epi8(3);
    Work512<M, P, R> work;
    __m512i plane[R], code[R], kept[R];
    for (int r = 0; r < R; r++) {
        const __m512i record = _mm512_permutexvar_epi32(
            spread, _mm512_maskz_loadu_epi32(0xfff, records_of<K>(unit, t + r)));
        work.table[r] = _mm512_or_si512(_mm512_shuffle_epi8(record, entries), zeros);
        for (int m = 0; m < M; m++) {
            const __m512i start =
                _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(starts + 4 * m)));
            (P == 2 ? work.low : work.high)[r][m] = start;
            if (P == 2) work.high[r][m] = _mm512_setzero_si512();
        }
    }
    // a step asks for its share of a later unit's 15 lines: all at once they would stall the loads
    const uint8_t* ahead = unit + kAhead + t * 4 * kPlane;
#define COLUMNS(k)                                                                              \
    for (int i = 0; i < R / 2; i++)                                                             \
        _mm_prefetch((const char*)ahead + kPlane * ((k) * (R / 2) + i), _MM_HINT_T1);              \
    columns_512<M, P, R>(work, code, flags + 16 * (k), values + (k) * M * P * 16)
#define EACH(...) for (int r = 0; r < R; r++) __VA_ARGS__
#define LOAD(i) EACH(plane[r] = _mm512_loadu_si512(planes_of<K>(unit, t + r) + (i) * kPlane))
    LOAD(0);
    EACH(code[r] = plane[r]);
    COLUMNS(0);
    EACH(code[r] = _mm512_srli_epi16(plane[r], 3));
    COLUMNS(1);
    if (K == 8) {
        EACH(kept[r] = _mm512_srli_epi16(plane[r], 6));
        LOAD(2);
        EACH(code[r] = plane[r]);
        COLUMNS(4);
        EACH(code[r] = _mm512_srli_epi16(plane[r], 3));
        COLUMNS(5);
        // bits 0-1 from A, bit 2 from C
        EACH(code[r] = _mm512_ternarylogic_epi32(kept[r], _mm512_srli_epi16(plane[r], 4), three,
                                                 0xe4));
        COLUMNS(6);
        EACH(kept[r] = _mm512_srli_epi16(plane[r], 5));
    }
    LOAD(1);
    EACH(code[r] = plane[r]);
    COLUMNS(2);
    EACH(code[r] = _mm512_srli_epi16(plane[r], 3));
    COLUMNS(3);
    if (K == 8) {
        EACH(code[r] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(plane[r], 6), kept[r], three,
                                                 0xe4));
        COLUMNS(7);
    }
#undef LOAD
#undef EACH
#undef COLUMNS
    for (int r = 0; r < R; r++) {
        // the scale is the upper half of a record's last dword; the table's registers are free now
        const __m512i record = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(2, 2, 2, 2, 5, 5, 5, 5, 8, 8, 8, 8, 11, 11, 11, 11),
            _mm512_maskz_loadu_epi32(0xfff, records_of<K>(unit, t + r)));
        const __m512 scale = _mm512_castsi512_ps(
            _mm512_and_si512(record, _mm512_set1_epi32((int)0xffff0000)));
        for (int m = 0; m < M; m++) {
            __m512i sum = work.high[r][m];
            if (P == 2)
                sum = _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(sum, 8), sum),
                                       work.low[r][m]);
            const __m512 act = _mm512_set1_ps(acts.scale[b * M + m]);
            sums[r][m] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, act), sums[r][m]);
        }
    }
}

template <int M, int P, int R>
T512 __attribute__((noinline)) void strip_512(const Job& j, int64_t strip, int m0) {
    const Acts acts = group_of<P>(j.acts, j.shape.blocks(), m0);
    __m512 sums[kTiles][M];
    for (int t = 0; t < kTiles; t++)
        for (int m = 0; m < M; m++) sums[t][m] = _mm512_setzero_ps();
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += kFull)
        for (int t = 0; t < kTiles; t += R)
            block_512<M, P, R, 8>(acts, j.flags, unit, t, b, sums + t);
    if (j.shape.half)
        for (int t = 0; t < kTiles; t += R)
            block_512<M, P, R, 4>(acts, j.flags, unit, t, j.shape.full, sums + t);
    for (int t = 0; t < kTiles; t++)
        for (int m = 0; m < M; m++) {
            float lanes[16], rows[kRows];
            _mm512_storeu_ps(lanes, sums[t][m]);
            for (int i = 0; i < kRows; i++)
                rows[i] = (lanes[4 * i] + lanes[4 * i + 1]) + (lanes[4 * i + 2] + lanes[4 * i + 3]);
            store_sums(j, strip * kTiles + t, m0 + m, rows, 0, kRows);
        }
}

// Two int8 rows x 16 columns at a time. With VNNI levels are unsigned (level + 128), which `start`
// corrects; without it products are made of |level| and the activation with the level's sign.
template <bool VNNI>
T256 INLINE __m256i dot_256(__m256i sum, __m256i w, __m256i size, __m256i x) {
    if (VNNI) {
        // the VEX form, spelled out: its intrinsic needs a target that AVX2 code cannot inline
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
        return sum;
    }
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w));  // <= 2 * 128 * 127
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

T256 INLINE __m256i twice(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}

// Of tile t, R = 2: both halves at once; R = 1: the half that `half` names.
template <bool VNNI, int M, int P, int R, int K>
T256 INLINE void block_256(const Acts& acts, const uint8_t* flags, const uint8_t* unit, int t,
                           int64_t b, int half, __m256 (*sums)[M]) {
    stay();
    const int8_t* values = acts.values + b * kBlock * M * P;
    const int32_t* starts = acts.start + 4 * b * M;
    flags += b * kBlock;
    const __m256i spread = _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5);
    const __m256i six = _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0);
    const __m256i entries = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, 1, 2, 3, 4, 5, -1, -1, 6, 7, 8, 9, -1, -1, -1));
    const __m256i zeros = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-128, 0, 0, 0, 0, 0, 0, -128, -128, 0, 0, 0, 0, -128, -128, -128));
    const __m256i seven = _mm256_set1_epi8(7), three = _mm256_set1_epi8(3);
    __m256i A[R], B[R], C[R], table[R], high[R][M], low[R][M];
    __m256 scale[R];
    for (int r = 0; r < R; r++) {
        const uint8_t* at = planes_of<K>(unit, t) + 32 * (half + r);
        A[r] = _mm256_loadu_si256((const __m256i*)at);
        B[r] = _mm256_loadu_si256((const __m256i*)(at + kPlane));
        if (K == 8) C[r] = _mm256_loadu_si256((const __m256i*)(at + 2 * kPlane));
        __asm__("" : "+x"(A[r]), "+x"(B[r]));  // load once, not again for every shift
        if (K == 8) __asm__("" : "+x"(C[r]));
        const uint8_t* records = records_of<K>(unit, t) + 2 * kRecord * (half + r);
        const __m256i record =
            _mm256_permutevar8x32_epi32(_mm256_maskload_epi32((const int*)records, six), spread);
        table[r] = _mm256_or_si256(_mm256_shuffle_epi8(record, entries), zeros);
        if (!VNNI) table[r] = _mm256_xor_si256(table[r], _mm256_set1_epi8(-128));
        scale[r] = _mm256_castsi256_ps(_mm256_and_si256(
            _mm256_shuffle_epi32(record, 0xaa), _mm256_set1_epi32((int)0xffff0000)));
        for (int m = 0; m < M; m++) {
            __m256i start = _mm256_setzero_si256();
            if (VNNI) start = twice(starts + 4 * m);
            (P == 2 ? low : high)[r][m] = start;
            if (P == 2) high[r][m] = _mm256_setzero_si256();
        }
    }
    const uint8_t* ahead = unit + kAhead + (2 * t + half) * 2 * kPlane;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        if (R == 2 ? k % 2 == 0 : k % 4 == 0)
            _mm_prefetch((const char*)ahead + kPlane * (R * k / 4), _MM_HINT_T1);
        const __m256i flag = twice(flags + 16 * k);
        __m256i w[R], size[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            __m256i code;
            switch (k) {
                case 0: code = A[r]; break;
                case 1: code = _mm256_srli_epi16(A[r], 3); break;
                case 2: code = B[r]; break;
                case 3: code = _mm256_srli_epi16(B[r], 3); break;
                case 4: code = C[r]; break;
                case 5: code = _mm256_srli_epi16(C[r], 3); break;
                case 6:
                    code = _mm256_or_si256(
                        _mm256_and_si256(_mm256_srli_epi16(A[r], 6), three),
                        _mm256_andnot_si256(three, _mm256_srli_epi16(C[r], 4)));
                    break;
                default:
                    code = _mm256_or_si256(
                        _mm256_and_si256(_mm256_srli_epi16(B[r], 6), three),
                        _mm256_andnot_si256(three, _mm256_srli_epi16(C[r], 5)));
                    break;
            }
            const __m256i index = _mm256_or_si256(_mm256_and_si256(code, seven), flag);
            w[r] = _mm256_shuffle_epi8(table[r], index);
            size[r] = VNNI ? w[r] : _mm256_abs_epi8(w[r]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const int8_t* x = values + (k * M + m) * P * 16;
            const __m256i hi = twice(x);
            for (int r = 0; r < R; r++) high[r][m] = dot_256<VNNI>(high[r][m], w[r], size[r], hi);
            if (P == 2) {
                const __m256i lo = twice(x + 16);
                for (int r = 0; r < R; r++) low[r][m] = dot_256<VNNI>(low[r][m], w[r], size[r], lo);
            }
        }
    }
    for (int m = 0; m < M; m++) {
        const __m256 act = _mm256_set1_ps(acts.scale[b * M + m]);
        for (int r = 0; r < R; r++) {
            __m256i sum = high[r][m];
            if (P == 2)
                sum = _mm256_add_epi32(
                    _mm256_sub_epi32(_mm256_slli_epi32(sum, 8), sum), low[r][m]);
            sums[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale[r], act),
                                         sums[r][m]);
        }
    }
}

template <bool VNNI, int M, int P, int R>
T256 __attribute__((noinline)) void strip_256(const Job& j, int64_t strip, int m0) {
    const Acts acts = group_of<P>(j.acts, j.shape.blocks(), m0);
    __m256 sums[2 * kTiles][M];
    for (int i = 0; i < 2 * kTiles; i++)
        for (int m = 0; m < M; m++) sums[i][m] = _mm256_setzero_ps();
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += kFull)
        for (int i = 0; i < 2 * kTiles; i += R)
            block_256<VNNI, M, P, R, 8>(acts, j.flags, unit, i / 2, b, i % 2, sums + i);
    if (j.shape.half)
        for (int i = 0; i < 2 * kTiles; i += R)
            block_256<VNNI, M, P, R, 4>(acts, j.flags, unit, i / 2, j.shape.full, i % 2, sums + i);
    for (int i = 0; i < 2 * kTiles; i++)
        for (int m = 0; m < M; m++) {
            float lanes[8], rows[2];
            _mm256_storeu_ps(lanes, sums[i][m]);
            for (int k = 0; k < 2; k++)
                rows[k] = (lanes[4 * k] + lanes[4 * k + 1]) + (lanes[4 * k + 2] + lanes[4 * k + 3]);
            store_sums(j, strip * kTiles + i / 2, m0 + m, rows, 2 * (i % 2), 2);
        }
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
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}

template <bool DOT, int M, int P, int K>
INLINE void block_neon(const Acts& acts, const uint8_t* flags, const uint8_t* unit, int t,
                       int64_t b, int r, float32x4_t* sums) {
    static const uint8_t entries[16] = {255, 0, 1, 2, 3, 4, 5,   255,
                                        255, 6, 7, 8, 9, 255, 255, 255};
    static const uint8_t zeros[16] = {128, 0, 0, 0, 0, 0, 0,   128,
                                      128, 0, 0, 0, 0, 128, 128, 128};
    stay();
    const int8_t* values = acts.values + b * kBlock * M * P;
    flags += b * kBlock;
    const uint8_t* record = records_of<K>(unit, t) + r * kRecord;
    const uint8_t* planes = planes_of<K>(unit, t) + 16 * r;
    uint8_t own[16] = {0};
    memcpy(own, record, kRecord);
    const uint8x16_t table = veorq_u8(
        vorrq_u8(vqtbl1q_u8(vld1q_u8(own), vld1q_u8(entries)), vld1q_u8(zeros)), vdupq_n_u8(128));
    const uint8x16_t A = vld1q_u8(planes), B = vld1q_u8(planes + kPlane);
    const uint8x16_t C = K == 8 ? vld1q_u8(planes + 2 * kPlane) : A;
    const uint8x16_t seven = vdupq_n_u8(7), four = vdupq_n_u8(4);
    int32x4_t high[M], low[M];
    for (int m = 0; m < M; m++) high[m] = low[m] = vdupq_n_s32(0);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        uint8x16_t code;
        switch (k) {
            case 0: code = vandq_u8(A, seven); break;
            case 1: code = vandq_u8(vshrq_n_u8(A, 3), seven); break;
            case 2: code = vandq_u8(B, seven); break;
            case 3: code = vandq_u8(vshrq_n_u8(B, 3), seven); break;
            case 4: code = vandq_u8(C, seven); break;
            case 5: code = vandq_u8(vshrq_n_u8(C, 3), seven); break;
            case 6: code = vorrq_u8(vshrq_n_u8(A, 6), vandq_u8(vshrq_n_u8(C, 4), four)); break;
            default: code = vorrq_u8(vshrq_n_u8(B, 6), vandq_u8(vshrq_n_u8(C, 5), four)); break;
        }
        const int8x16_t w = vreinterpretq_s8_u8(
            vqtbl1q_u8(table, vorrq_u8(code, vld1q_u8(flags + 16 * k))));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const int8_t* x = values + (k * M + m) * P * 16;
            const int8x16_t hi = vld1q_s8(x);
            high[m] = DOT ? dot_armv82(high[m], w, hi) : dot_neon(high[m], w, hi);
            if (P == 2) {
                const int8x16_t lo = vld1q_s8(x + 16);
                low[m] = DOT ? dot_armv82(low[m], w, lo) : dot_neon(low[m], w, lo);
            }
        }
    }
    const float scale = record_scale(record);
    for (int m = 0; m < M; m++) {
        const int32x4_t sum =
            P == 2 ? vaddq_s32(vsubq_s32(vshlq_n_s32(high[m], 8), high[m]), low[m]) : high[m];
        const float act = scale * acts.scale[b * M + m];
        sums[m] = vfmaq_n_f32(sums[m], vcvtq_f32_s32(sum), act);
    }
}

template <bool DOT, int M, int P>
void strip_neon(const Job& j, int64_t strip, int m0) {
    const Acts acts = group_of<P>(j.acts, j.shape.blocks(), m0);
    float32x4_t sums[kTiles * kRows][M];
    for (int i = 0; i < kTiles * kRows; i++)
        for (int m = 0; m < M; m++) sums[i][m] = vdupq_n_f32(0);
    const uint8_t* unit = j.tiles + strip * j.shape.stride;
    for (int64_t b = 0; b < j.shape.full; b++, unit += kFull)
        for (int i = 0; i < kTiles * kRows; i++)
            block_neon<DOT, M, P, 8>(acts, j.flags, unit, i / kRows, b, i % kRows, sums[i]);
    if (j.shape.half)
        for (int i = 0; i < kTiles * kRows; i++)
            block_neon<DOT, M, P, 4>(acts, j.flags, unit, i / kRows, j.shape.full, i % kRows,
                                     sums[i]);
    for (int i = 0; i < kTiles * kRows; i++)
        for (int m = 0; m < M; m++) {
            const float sum = vaddvq_f32(sums[i][m]);
            store_sums(j, strip * kTiles + i / kRows, m0 + m, &sum, i % kRows, 1);
        }
}

#endif
// ---- dispatch ----------------------------------------------------------------------------------

// Multiply a strip (16 rows) with a group of vectors that starts at m0.
typedef void (*Step)(const Job&, int64_t strip, int m0);

constexpr int kSizes = 3;
const int kSize[kSizes] = {4, 2, 1};  // vectors that a step takes

struct Steps {
    Step step[kSizes];
};

#if defined(__x86_64__)
template <int P>
const Steps steps_512 = {{strip_512<4, P, 2>, strip_512<2, P, 2>, strip_512<1, P, 4>}};
template <bool VNNI, int P>
const Steps steps_256 = {
    {strip_256<VNNI, 4, P, 1>, strip_256<VNNI, 2, P, 1>, strip_256<VNNI, 1, P, 2>}};
#endif
#if defined(__aarch64__)
template <bool DOT, int P>
const Steps steps_neon = {{strip_neon<DOT, 4, P>, strip_neon<DOT, 2, P>, strip_neon<DOT, 1, P>}};
#endif

// Null = portable, which takes all vectors at once.
template <int P>
const Steps* steps_of(int isa) {
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return &steps_256<false, P>;
        case AVXVNNI: return &steps_256<true, P>;
        case AVX512: return &steps_512<P>;
#endif
#if defined(__aarch64__)
        case NEON: return &steps_neon<false, P>;
        case NEONDOT: return &steps_neon<true, P>;
#endif
        default: return nullptr;
    }
}

// Which of `kSize` takes the next vectors of `left`.
INLINE int pick(int left) {
    int s = 0;
    while (kSize[s] > left) s++;
    return s;
}

// All vectors: the codes of a strip come from memory once and stay in the cache.
template <int P>
void multiply_strip(const Job& j, const Steps* steps, int64_t strip, int batch) {
    if (!steps) return strip_portable<P>(j, strip, batch);
    for (int m = 0; m < batch;) {
        const int s = pick(batch - m);
        steps->step[s](j, strip, m);
        m += kSize[s];
    }
}

template <int P>
void multiply(const Job& j, int isa, int batch, int threads) {
    const Steps* steps = steps_of<P>(isa);
    const int64_t strips = j.shape.strips;
    // below about 50 kB a second thread costs more than it saves
    const int64_t worth = strips * j.shape.stride * batch / 50000;
    if (threads > worth) threads = worth < 1 ? 1 : (int)worth;
    int64_t chunk = strips / (8 * threads);
    chunk = chunk < 1 ? 1 : chunk;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < strips; i++) multiply_strip<P>(j, steps, i, batch);
}

template <int P, class T>
INLINE void quantise_all(const Steps* steps, const Shape& s, const T* x, int batch, int8_t* values,
                         float* scale, int32_t* start) {
    for (int m = 0; m < batch;) {
        const int count = steps ? kSize[pick(batch - m)] : batch;
        quantise_group<P>(s, x, m, count, values, scale, start);
        m += count;
    }
}

#if defined(__x86_64__)
// The same code, compiled for wider registers.
template <int P, class T>
T256 void quantise_avx2(const Steps* steps, const Shape& s, const T* x, int batch, int8_t* values,
                        float* scale, int32_t* start) {
    quantise_all<P>(steps, s, x, batch, values, scale, start);
}
#endif

template <int P, class T>
void quantise([[maybe_unused]] int isa, const Shape& s, const T* x, int batch, int8_t* values,
              float* scale, int32_t* start) {
#if defined(__x86_64__)
    if (isa != PORTABLE)
        return quantise_avx2<P>(steps_of<P>(isa), s, x, batch, values, scale, start);
#endif
    quantise_all<P>(steps_of<P>(isa), s, x, batch, values, scale, start);
}

template <int P>
void linear(Job& j, const void* x, int dtype, int batch, int isa, int threads, int8_t* values,
            float* scale, int32_t* start) {
    if (dtype == BFLOAT16)
        quantise<P>(isa, j.shape, (const uint16_t*)x, batch, values, scale, start);
    else
        quantise<P>(isa, j.shape, (const float*)x, batch, values, scale, start);
    j.acts = Acts{values, scale, start};
    multiply<P>(j, isa, batch, threads);
}

// ---- dense panels ------------------------------------------------------------------------------

INLINE void store_value(float* out, float value) { *out = value; }
INLINE void store_value(uint16_t* out, float value) { *out = to_bfloat16(value); }

// n columns of row r of tile t, in one block; fewer than 16 K at the end of the matrix.
template <int K, class T>
INLINE void dense_row(const uint8_t* unit, const uint8_t* flags, int t, int r, int n, T* out) {
    const uint8_t* record = records_of<K>(unit, t) + r * kRecord;
    const float scale = record_scale(record);
    int8_t levels[16];
    T values[16];
    level_table(record, levels);
    for (int i = 0; i < 16; i++) store_value(values + i, (float)levels[i] * scale);
    uint8_t index[16];
    for (int k = 0; 16 * k < n; k++) {
        decode_codes(planes_of<K>(unit, t), r, k, index);
        const int left = n - 16 * k < 16 ? n - 16 * k : 16;
        for (int i = 0; i < left; i++) out[16 * k + i] = values[index[i] | flags[16 * k + i]];
    }
}

#if defined(__x86_64__)
// A row's 16 values are one register of float32, or half a register of bfloat16.
T512 INLINE void place_512(__m128i index, __m512 values, float* out) {
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), values));
}

T512 INLINE void place_512(__m128i index, __m512 values, uint16_t* out) {
    // round to nearest even, as torch does; levels are finite
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m256i table = _mm512_cvtepi32_epi16(_mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
    _mm256_storeu_si256((__m256i*)out,
                        _mm256_permutexvar_epi16(_mm256_cvtepu8_epi16(index), table));
}

template <int K, class T>
T512 INLINE void dense_row_512(const uint8_t* unit, const uint8_t* flags, int t, int r, T* out) {
    const uint8_t* record = records_of<K>(unit, t) + r * kRecord;
    int8_t levels[16];
    level_table(record, levels);
    const __m512 values = _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)levels))),
        _mm512_set1_ps(record_scale(record)));
    const uint8_t* planes = planes_of<K>(unit, t) + 16 * r;
    const __m128i A = _mm_loadu_si128((const __m128i*)planes);
    const __m128i B = _mm_loadu_si128((const __m128i*)(planes + kPlane));
    const __m128i C = K == 8 ? _mm_loadu_si128((const __m128i*)(planes + 2 * kPlane)) : A;
    const __m128i three = _mm_set1_epi8(3), seven = _mm_set1_epi8(7);
    const __m128i code[8] = {
        A, _mm_srli_epi16(A, 3), B, _mm_srli_epi16(B, 3), C, _mm_srli_epi16(C, 3),
        _mm_ternarylogic_epi32(_mm_srli_epi16(A, 6), _mm_srli_epi16(C, 4), three, 0xe4),
        _mm_ternarylogic_epi32(_mm_srli_epi16(B, 6), _mm_srli_epi16(C, 5), three, 0xe4)};
    for (int k = 0; k < K; k++) {
        const __m128i flag = _mm_loadu_si128((const __m128i*)(flags + 16 * k));
        place_512(_mm_ternarylogic_epi32(code[k], seven, flag, 0xea), values, out + 16 * k);
    }
}

template <class T>
T512 void dense_512(const Shape& s, const uint8_t* unit, const uint8_t* flags, int t, int r,
                    T* out) {
    for (int64_t b = 0; b < s.full; b++, unit += kFull, flags += kBlock, out += kBlock) {
        const int64_t left = s.cols - b * kBlock;
        if (left >= kBlock) dense_row_512<8>(unit, flags, t, r, out);
        else dense_row<8>(unit, flags, t, r, (int)left, out);
    }
    const int64_t left = s.cols - s.full * kBlock;
    if (s.half && left == kBlock / 2) dense_row_512<4>(unit, flags, t, r, out);
    else if (s.half) dense_row<4>(unit, flags, t, r, (int)left, out);
}
#endif

template <class T>
INLINE void dense_any(const Shape& s, const uint8_t* unit, const uint8_t* flags, int t, int r,
                      T* out) {
    for (int64_t b = 0; b < s.full; b++, unit += kFull, flags += kBlock, out += kBlock) {
        const int64_t left = s.cols - b * kBlock;
        dense_row<8>(unit, flags, t, r, left < kBlock ? (int)left : kBlock, out);
    }
    if (s.half) dense_row<4>(unit, flags, t, r, (int)(s.cols - s.full * kBlock), out);
}

template <class T>
void dense(const Shape& s, const uint8_t* tiles, const uint8_t* flags, int64_t row0, int64_t row1,
           T* out, [[maybe_unused]] int isa, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1)
    for (int64_t row = row0; row < row1; row++) {
        const uint8_t* unit = tiles + row / (kTiles * kRows) * s.stride;
        const int t = (int)(row / kRows % kTiles), r = (int)(row % kRows);
        T* to = out + (row - row0) * s.cols;
#if defined(__x86_64__)
        if (isa == AVX512) {
            dense_512(s, unit, flags, t, r, to);
            continue;
        }
#endif
        dense_any(s, unit, flags, t, r, to);
    }
}

// ---- the read ceiling --------------------------------------------------------------------------

// Nothing but reads of whole cache lines, eight independent sums: what no kernel can beat.
INLINE uint64_t read_all(const uint64_t* data, int64_t words) {
    uint64_t sums[64] = {0};
    for (int64_t i = 0; i + 64 <= words; i += 64)
        for (int k = 0; k < 64; k++) sums[k] ^= data[i + k];
    uint64_t sum = 0;
    for (int k = 0; k < 64; k++) sum ^= sums[k];
    return sum;
}

uint64_t read_portable(const uint64_t* data, int64_t words) { return read_all(data, words); }
#if defined(__x86_64__)
T256 uint64_t read_256(const uint64_t* data, int64_t words) {
    __m256i sums[8] = {};
    for (int64_t i = 0; i + 32 <= words; i += 32)
        for (int k = 0; k < 8; k++)
            sums[k] = _mm256_xor_si256(
                sums[k], _mm256_loadu_si256((const __m256i*)(data + i + 4 * k)));
    uint64_t lanes[4], sum = 0;
    for (int k = 1; k < 8; k++) sums[0] = _mm256_xor_si256(sums[0], sums[k]);
    _mm256_storeu_si256((__m256i*)lanes, sums[0]);
    for (int k = 0; k < 4; k++) sum ^= lanes[k];
    return sum;
}
T512 uint64_t read_512(const uint64_t* data, int64_t words) {
    __m512i sums[8] = {};
    for (int64_t i = 0; i + 64 <= words; i += 64)
        for (int k = 0; k < 8; k++)
            sums[k] = _mm512_xor_si512(sums[k], _mm512_loadu_si512(data + i + 8 * k));
    uint64_t lanes[8], sum = 0;
    for (int k = 1; k < 8; k++) sums[0] = _mm512_xor_si512(sums[0], sums[k]);
    _mm512_storeu_si512(lanes, sums[0]);
    for (int k = 0; k < 8; k++) sum ^= lanes[k];
    return sum;
}
#endif

uint64_t read_words([[maybe_unused]] int isa, const uint64_t* data, int64_t words) {
#if defined(__x86_64__)
    if (isa == AVX512) return read_512(data, words);
    if (isa != PORTABLE) return read_256(data, words);
#endif
    return read_portable(data, words);
}

}  // namespace

// ---- what Python calls -------------------------------------------------------------------------

// Version of this interface; native.py refuses another.
EXPORT int subbit_b3_version() { return 1; }

// Whether this processor (and this build) runs instruction set `isa`.
EXPORT int subbit_b3_supports(int isa) {
    if (isa == PORTABLE) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == AVX2) return avx2;
    if (isa == AVXVNNI) {
        // leaf 7, subleaf 1, EAX bit 4; compilers name this feature only since gcc 11
        uint32_t a = 7, b, c = 1, d;
        uint32_t top = 0, b0, c0 = 0, d0;
        __asm__("cpuid" : "+a"(top), "=b"(b0), "+c"(c0), "=d"(d0));
        if (!avx2 || top < 7) return 0;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return a >> 4 & 1;
    }
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

// out (batch, rows) float32 = x (batch, cols) @ W^T; batch 1 .. 16, planes 1 or 2.
// Returns 0; 1 = sizes that do not fit, 2 = out of memory, 3 = unknown instruction set.
EXPORT int subbit_b3_linear(const void* x, int dtype, int batch, const uint8_t* tiles,
                            int64_t tile_bytes, const uint8_t* flags, int64_t flag_bytes,
                            int64_t rows, int64_t cols, float* out, int planes, int isa,
                            int threads) {
    Job job;
    if (!make_shape(rows, cols, tile_bytes, flag_bytes, &job.shape)) return 1;
    if (batch < 1 || batch > kMaxBatch || (planes != 1 && planes != 2) || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    job.tiles = tiles, job.flags = flags, job.out = out;
    const int64_t blocks = job.shape.blocks() * batch;
    const int64_t plane_bytes = blocks * kBlock * planes;
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, (size_t)(plane_bytes + blocks * 20))) return 2;
    int8_t* values = (int8_t*)scratch;
    int32_t* start = (int32_t*)(values + plane_bytes);
    float* scale = (float*)(start + 4 * blocks);
    if (planes == 2)
        linear<2>(job, x, dtype, batch, isa, threads, values, scale, start);
    else
        linear<1>(job, x, dtype, batch, isa, threads, values, scale, start);
    free(scratch);
    return 0;
}

// Rows row0 .. row1 - 1 of W, dense, as float32 or bfloat16; returns as above.
EXPORT int subbit_b3_dense(const uint8_t* tiles, int64_t tile_bytes, const uint8_t* flags,
                           int64_t flag_bytes, int64_t rows, int64_t cols, int64_t row0,
                           int64_t row1, void* out, int dtype, int isa, int threads) {
    Shape shape;
    if (!make_shape(rows, cols, tile_bytes, flag_bytes, &shape)) return 1;
    if (row0 < 0 || row0 > row1 || row1 > rows || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    if (dtype == BFLOAT16)
        dense(shape, tiles, flags, row0, row1, (uint16_t*)out, isa, threads);
    else
        dense(shape, tiles, flags, row0, row1, (float*)out, isa, threads);
    return 0;
}

// Read `bytes` bytes (whole chunks of 64 KiB) and return their xor: the measure of other kernels.
EXPORT uint64_t subbit_b3_read(const void* data, int64_t bytes, int isa, int threads) {
    const int64_t chunk = 65536, chunks = bytes / chunk;
    uint64_t sum = 0;
    if (!subbit_b3_supports(isa) || threads < 1) return 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1) reduction(^ : sum)
    for (int64_t i = 0; i < chunks; i++)
        sum ^= read_words(isa, (const uint64_t*)data + i * (chunk / 8), chunk / 8);
    return sum;
}

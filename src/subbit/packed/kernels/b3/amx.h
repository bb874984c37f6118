// AMX: sixteen rows x 64 columns with sixteen vectors at a time.

#pragma once

#include "activations.h"
#include "avx512.h"

#if defined(HAS_AMX)
#define TAMX \
    __attribute__((target("amx-tile,amx-int8,amx-bf16," \
                          "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

namespace {

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

}  // namespace
#endif

// AVX-512: four rows x 16 columns at a time.

#pragma once

#include "x86.h"

#if defined(__x86_64__)
namespace {

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

}  // namespace
#endif

// AVX2 and AVX-VNNI: two rows x 16 columns at a time.

#pragma once

#include "activations.h"
#include "x86.h"

#if defined(__x86_64__)
namespace {

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

}  // namespace
#endif

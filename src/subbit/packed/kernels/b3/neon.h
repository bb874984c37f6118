// ARM: a row x 16 columns at a time.

#pragma once

#include "layout.h"

#if defined(__aarch64__)
namespace {

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

}  // namespace
#endif

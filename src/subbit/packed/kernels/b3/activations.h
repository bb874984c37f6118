// Activations as int8 planes, in the order that each instruction set reads them.

#pragma once

#include "layout.h"

namespace {

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

}  // namespace

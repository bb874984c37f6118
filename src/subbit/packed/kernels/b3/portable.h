// Products in plain C++, for any processor; what a tile says, a row at a time.

#pragma once

#include "layout.h"

namespace {

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

}  // namespace

// Rows of the dense matrix, as float32 or bfloat16.

#pragma once

#include "avx2.h"
#include "avx512.h"
#include "portable.h"

namespace {

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

}  // namespace

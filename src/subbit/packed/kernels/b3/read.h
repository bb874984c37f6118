// The read ceiling: how fast memory is read where nothing else is done.

#pragma once

#include "x86.h"

namespace {

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

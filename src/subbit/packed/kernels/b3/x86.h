// What AVX2, AVX-512 and AMX share: targets, and asking for memory ahead of its use.

#pragma once

#include "layout.h"

#if defined(__x86_64__)
#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define T256 __attribute__((target("avx2,fma")))

namespace {

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

}  // namespace
#endif

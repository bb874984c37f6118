// A product: the kernel of the instruction set asked for, strips shared among threads.

#pragma once

#include "activations.h"
#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "neon.h"
#include "portable.h"

namespace {

// Multiply `n` strips (16 rows each) with all vectors: their codes come from memory once.
typedef void (*Strips)(const Job&, int64_t first, int n);

template <class F, int P>
Strips strips_of(int isa, [[maybe_unused]] bool salient) {
    constexpr bool maybe [[maybe_unused]] = F::kBits == 3;  // B2 has no salient columns
    switch (isa) {
#if defined(__x86_64__)
        case AVX2: return salient ? strips_256<F, false, maybe, P> : strips_256<F, false, false, P>;
        case AVXVNNI: return salient ? strips_256<F, true, maybe, P> : strips_256<F, true, false, P>;
        case AVX512: return strips_512<F, P>;
#if defined(HAS_AMX)
        case AMX: return strips_amx<F, P>;
#endif
#endif
#if defined(__aarch64__)
        case NEON: return strips_neon<F, false, P>;
        case NEONDOT: return strips_neon<F, true, P>;
#endif
        default: return strips_portable<F, P>;
    }
}

// Below about 50 kB a second thread costs more than it saves.
int threads_worth(const Job& j, int threads) {
    const int64_t worth = j.shape.strips * j.shape.stride * j.batch / 50000;
    return threads <= worth ? threads : worth < 1 ? 1 : (int)worth;
}

template <int P>
void multiply(const Job& j, int isa, int threads) {
    const Strips multiply_strips = j.shape.bits == 2 ? strips_of<B2, P>(isa, false)
                                                     : strips_of<B3, P>(isa, j.shape.salient);
    const int64_t strips = j.shape.strips;
    threads = threads_worth(j, threads);
    // fewer side by side where threads would go without, or the last ones end late
    int64_t side = strips / (4 * threads);
    side = side < 1 ? 1 : side < kStreams ? side : kStreams;
    const int64_t groups = (strips + side - 1) / side;
    int64_t chunk = groups / (8 * threads);
    chunk = chunk < 1 ? 1 : chunk;
#pragma omp parallel for schedule(guided, chunk) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < groups; i++) {
        const int64_t first = i * side, left = strips - first;
        multiply_strips(j, first, (int)(left < side ? left : side));
    }
}

#if defined(__x86_64__)
// The same code, compiled for wider registers.
template <Order ORDER, int P, class T>
T256 void quantise_256(const Shape& s, const T* x, int batch, int8_t* values, float* scale,
                       int32_t* start) {
    quantise_all<ORDER, P>(s, x, batch, values, scale, start);
}
#endif

template <int P, class T>
void quantise([[maybe_unused]] int isa, const Shape& s, const T* x, int batch, int8_t* values,
              float* scale, int32_t* start) {
#if defined(__x86_64__)
    if (isa == AVX2) return quantise_256<WORDS, P>(s, x, batch, values, scale, start);
    if (isa == AMX) return quantise_256<SQUARES, P>(s, x, batch, values, scale, start);
    if (isa != PORTABLE) return quantise_256<PLANES, P>(s, x, batch, values, scale, start);
#endif
    quantise_all<PLANES, P>(s, x, batch, values, scale, start);
}

template <int P>
void linear(Job& j, const void* x, int dtype, int isa, int threads, int8_t* values, float* scale,
            int32_t* start) {
    if (isa == AMX && j.batch < kSquareBatch) isa = AVX512;
    if (dtype == BFLOAT16)
        quantise<P>(isa, j.shape, (const uint16_t*)x, j.batch, values, scale, start);
    else
        quantise<P>(isa, j.shape, (const float*)x, j.batch, values, scale, start);
    j.acts = Acts{values, scale, start};
    multiply<P>(j, isa, threads);
}

}  // namespace

// Matrix products with weights in the layouts B3 and B2 (layout.py says what the bytes mean).
//
// Activations become one or two int8 planes for each block of 128 columns: x = s (256 hi + lo), or
// s hi with one plane. A tile of 4 rows x 128 columns is decoded in registers, 16 columns of its
// rows at a time: shift, mask, look the int8 level up in the row's 16-entry table, integer dot
// product. Per block the integers are multiplied by the scales of row and activations. Several tiles
// and several vectors at once share the loads of activations and the decoded levels. For AMX, whose
// tiles come from memory, the levels go through a buffer that stays in the first cache.
//
// Plain C++17 without the standard library. Every instruction set is compiled into the one object
// by target attributes; the caller names the one to use.
//
// Here is what Python calls; the work is done in b3/, which is compiled as part of this file.

#include "b3/cpu.h"
#include "b3/dense.h"
#include "b3/layout.h"
#include "b3/multiply.h"
#include "b3/prompts.h"
#include "b3/read.h"

// Version of this interface; native.py refuses another.
EXPORT int subbit_b3_version() { return 5; }

// Whether this processor (and this build) runs instruction set `isa`.
EXPORT int subbit_b3_supports(int isa) { return isa >= 0 && isa < kIsas && kFound.has[isa]; }

// What to multiply; every field has eight bytes.
struct Linear {
    const void* x;
    int64_t dtype, batch;
    const uint8_t* tiles;
    int64_t tile_bytes;
    const uint8_t* flags;
    int64_t flag_bytes, rows, cols;
    void* out;
    int64_t planes, isa, threads;
};

// out (batch, rows) = x (batch, cols) @ W^T, both of one type; planes 1 or 2.
// Returns 0; 1 = sizes that do not fit, 2 = out of memory, 3 = unknown instruction set.
EXPORT int subbit_b3_linear(const Linear* call) {
    const auto [x, dtype, batch, tiles, tile_bytes, flags, flag_bytes, rows, cols, out, planes, isa,
                threads] = *call;
    Job job;
    if (!make_shape(rows, cols, tile_bytes, flags, flag_bytes, &job.shape)) return 1;
    if (batch < 1 || (planes != 1 && planes != 2) || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    job.tiles = tiles, job.flags = flags;
#if defined(HAS_AMX)
    if (isa == AMX && dtype == BFLOAT16 && batch > 16 * kSquareGroups && cols <= kPromptCols)
        return multiply_prompt(job, (const uint16_t*)x, (uint16_t*)out, batch, (int)threads) ? 0 : 2;
#endif
    const int64_t limit = isa == AMX ? 16 * kSquareGroups : kMaxBatch;
    const int64_t most = batch < limit ? batch : limit, blocks = job.shape.blocks() * most;
    const int64_t plane_bytes = isa == AMX ? job.shape.blocks() * squares_of((int)most, planes)
                                           : blocks * values_of(isa == AVX2 ? WORDS : PLANES, planes);
    const int64_t out_bytes = dtype == BFLOAT16 ? most * rows * 4 : 0;
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, (size_t)(plane_bytes + blocks * 20 + out_bytes))) return 2;
    int8_t* values = (int8_t*)scratch;
    int32_t* start = (int32_t*)(values + plane_bytes);
    float* scale = (float*)(start + 4 * blocks);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4;
    for (int64_t m = 0; m < batch; m += most) {
        const void* from = (const char*)x + m * cols * size;
        void* to = (char*)out + m * rows * size;
        job.batch = (int)(batch - m < most ? batch - m : most);
        job.out = dtype == BFLOAT16 ? scale + blocks : (float*)to;
        if (planes == 2) linear<2>(job, from, dtype, isa, threads, values, scale, start);
        else linear<1>(job, from, dtype, isa, threads, values, scale, start);
        if (dtype == BFLOAT16)
            for (int64_t i = 0; i < job.batch * rows; i++) ((uint16_t*)to)[i] = to_bfloat16(job.out[i]);
    }
    free(scratch);
    return 0;
}

// Rows row0 .. row1 - 1 of W, dense, as float32 or bfloat16; returns as above.
EXPORT int subbit_b3_dense(const uint8_t* tiles, int64_t tile_bytes, const uint8_t* flags,
                           int64_t flag_bytes, int64_t rows, int64_t cols, int64_t row0,
                           int64_t row1, void* out, int dtype, int isa, int threads) {
    Shape shape;
    if (!make_shape(rows, cols, tile_bytes, flags, flag_bytes, &shape)) return 1;
    if (row0 < 0 || row0 > row1 || row1 > rows || threads < 1) return 1;
    if (!subbit_b3_supports(isa)) return 3;
    const auto decode = [&](auto* to) {
        if (shape.bits == 2) dense<B2>(shape, tiles, flags, row0, row1, to, isa, threads);
        else dense<B3>(shape, tiles, flags, row0, row1, to, isa, threads);
    };
    if (dtype == BFLOAT16) decode((uint16_t*)out);
    else decode((float*)out);
    return 0;
}

// Read `bytes` bytes (whole chunks of 64 KiB), as one stream or several side by side, and return their
// xor: the measure of other kernels.
EXPORT uint64_t subbit_b3_read(const void* data, int64_t bytes, int several, int isa, int threads) {
    const int64_t chunk = 65536, chunks = bytes / chunk, words = chunk / 8;
    const auto read = several ? read_words<kStreams> : read_words<1>;
    uint64_t sum = 0;
    if (!subbit_b3_supports(isa) || threads < 1) return 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1) reduction(^ : sum)
    for (int64_t i = 0; i < chunks; i++)
        sum ^= read(isa, (const uint64_t*)data + i * words, words);
    return sum;
}

// Prompts: many bfloat16 vectors with AMX.
//
// As torch would do it with the dense matrix: weights rounded to bfloat16, sums in float32. A tile of
// weights is a piece of 16 rows, as decoded; one of vectors has two columns of sixteen vectors in a
// row. 32 rows of weights are multiplied with 32 vectors at a time, `kDepth` blocks of columns deep,
// so that the rows stay in the first cache, and in the second what `kPromptVectors` vectors have in
// these columns and their sums with `kPromptRows` rows.

#pragma once

#include "amx.h"
#include "dense.h"
#include "multiply.h"

#if defined(HAS_AMX)
namespace {

constexpr int kDepth = 2, kPromptRows = 512, kPromptVectors = 512;
constexpr int64_t kPromptCols = 1 << 24;  // with more, how far vectors are apart would not fit an int
constexpr int kTile = 512, kSums = 256;  // values of a tile of bfloat16; of sums
constexpr int kBlockPieces = kBlock / kPiece;

// Sums of two strips with all vectors: for each pair of sixteens, even where the second is missing,
// tiles of 16 rows x 16 vectors, two of the first strip, then two of the second.
constexpr int64_t sums_of(int64_t sixteens) { return (sixteens + 1) / 2 * 4 * kSums; }

struct Prompt {
    const Job& job;
    const uint16_t* from;  // (batch, cols)
    uint16_t* to;          // (batch, rows)
    uint16_t* vectors;     // tiles (sixteens, pieces)
    int64_t sixteens, pieces;
};

// A tile of vectors: sixteen of them from number m on, 32 columns.
TAMX void pack_vectors(const Prompt& p, int64_t m, int64_t piece, uint16_t* out) {
    const int64_t cols = p.job.shape.cols, column = piece * kPiece;
    const int64_t there = p.job.batch - m < 16 ? p.job.batch - m : 16;
    const int64_t width = cols - column < kPiece ? cols - column : kPiece;
    alignas(64) uint16_t edge[kTile];
    const uint16_t* from = p.from + m * cols + column;
    int64_t apart = cols;
    if (there < 16 || width < kPiece) {
        memset(edge, 0, sizeof edge);
        for (int64_t i = 0; i < there && width > 0; i++)
            memcpy(edge + i * kPiece, from + i * cols, (size_t)width * 2);
        from = edge, apart = kPiece;
    }
    const __m512i down = multiples_of((int)(2 * apart));
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(out + 32 * i, _mm512_i32gather_epi32(down, from + 2 * i, 1));
}

// Blocks b0 .. b1 - 1 of two strips as tiles, those of the strips taking turns.
template <class F>
TAMX INLINE void decode_pair(const Job& j, int64_t strip, int64_t b0, int64_t b1, uint16_t* out) {
    const Shape& s = j.shape;
    for (int64_t i = 0; i < 2 && strip + i < s.strips; i++) {
        const uint8_t* unit = j.tiles + (strip + i) * s.stride + b0 * F::template kUnit<8>;
        for (int64_t b = b0; b < b1; b++, unit += F::template kUnit<8>) {
            uint16_t* to = out + ((b - b0) * kBlockPieces * 2 + i) * kTile;
            for (int row = 0; row < kTiles * kRows; row++) {
                const int t = row / kRows, r = row % kRows;
                // every second line of the next pair's unit: the processor takes them by twos
                if (row % 2 == 0) ask_for(unit + 2 * s.stride + row * kPlane);
                if (b < s.full)
                    dense_row_512<F, Row512<uint16_t>, 8>(unit, s.places, j.flags + b * kBlock, t, r,
                                                          to + row * kPiece, 2 * kTile);
                else
                    dense_row_512<F, Row512<uint16_t>, 4>(unit, s.places, j.flags + b * kBlock, t, r,
                                                          to + row * kPiece, 2 * kTile);
            }
        }
    }
}

// `count` pieces of two strips with sixteen vectors or, V = 2, with two sixteens `next` apart, added to
// their four tiles of `sums`; `begin`: there are no sums yet.
template <int V>
TAMX INLINE void multiply_pieces(const uint16_t* weights, const uint16_t* vectors, int64_t next,
                                 int64_t count, bool begin, float* sums) {
    stay();
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        if (V == 2) _tile_zero(2);
        if (V == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 2 * kSums, 64);
        if (V == 2) _tile_loadd(2, sums + kSums, 64);
        if (V == 2) _tile_loadd(3, sums + 3 * kSums, 64);
    }
    for (int64_t k = 0; k < count; k++) {
        _tile_loadd(6, vectors + k * kTile, 64);
        _tile_loadd(4, weights + k * 2 * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, weights + (k * 2 + 1) * kTile, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (V == 2) {
            _tile_loadd(7, vectors + next + k * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 2 * kSums, 64);
    if (V == 2) _tile_stored(2, sums + kSums, 64);
    if (V == 2) _tile_stored(3, sums + 3 * kSums, 64);
    stay();
}

// Sums of sixteen rows with sixteen vectors from number m on, rounded and put where they belong.
TAMX INLINE void store_rounded(const Prompt& p, int64_t row, int64_t m, const float* sums) {
    const int64_t rows = p.job.shape.rows;
    const __mmask16 there = first_of(rows - row);
    const __m512i down = multiples_of(16);
    for (int64_t i = 0; i < 16 && m + i < p.job.batch; i++) {
        const __m512i rounded = rounded_512(_mm512_i32gather_ps(down, sums + i, 4));
        _mm512_mask_cvtepi32_storeu_epi16(p.to + (m + i) * rows + row, there, rounded);
    }
}

// Strips first .. last - 1 with all vectors. `weights` has room for two strips `kDepth` blocks deep,
// `sums` for whole pairs of strips.
template <class F>
TAMX void multiply_rows(const Prompt& p, int64_t first, int64_t last, uint16_t* weights, float* sums) {
    const Job& j = p.job;
    const int64_t blocks = j.shape.blocks(), pair = sums_of(p.sixteens);
    load_tile_shapes();
    for (int64_t b0 = 0; b0 < blocks; b0 += kDepth) {
        const int64_t b1 = b0 + kDepth < blocks ? b0 + kDepth : blocks, begin = b0 * kBlockPieces;
        const int64_t count = (b1 * kBlockPieces < p.pieces ? b1 * kBlockPieces : p.pieces) - begin;
        for (int64_t strip = first; strip < last; strip += 2) {
            decode_pair<F>(j, strip, b0, b1, weights);
            float* to = sums + (strip - first) / 2 * pair;
            for (int64_t g = 0; g < p.sixteens; g += 2) {
                const uint16_t* vectors = p.vectors + (g * p.pieces + begin) * kTile;
                const int64_t next = p.pieces * kTile;
                if (g + 1 < p.sixteens)
                    multiply_pieces<2>(weights, vectors, next, count, b0 == 0, to + g * 2 * kSums);
                else
                    multiply_pieces<1>(weights, vectors, next, count, b0 == 0, to + g * 2 * kSums);
            }
        }
    }
    _tile_release();
    for (int64_t strip = first; strip < last; strip++)
        for (int64_t g = 0; g < p.sixteens; g++) {
            const int64_t tile = g / 2 * 4 + (strip - first) % 2 * 2 + g % 2;
            store_rounded(p, strip * kTiles * kRows, 16 * g,
                          sums + (strip - first) / 2 * pair + tile * kSums);
        }
}

// All vectors of a job at once, bfloat16 `from` and `to`; false = out of memory.
template <class F>
bool multiply_part(const Job& j, const uint16_t* from, uint16_t* to, int threads) {
    threads = threads_worth(j, threads);
    const int64_t sixteens = sixteens_of(j.batch), pieces = j.shape.width() / kPiece;
    const int64_t strips = j.shape.strips, most = kPromptRows / (kTiles * kRows);
    const int64_t parts = threads * ((strips + threads * most - 1) / (threads * most));
    const int64_t each = ((strips + parts - 1) / parts + 1) / 2 * 2;  // strips of a part
    const int64_t packed = sixteens * pieces * kTile * 2;
    const int64_t decoded = 2 * kDepth * kBlockPieces * kTile;
    const int64_t own = decoded * 2 + each / 2 * sums_of(sixteens) * 4;
    void* room = nullptr;
    if (posix_memalign(&room, 64, (size_t)(packed + threads * own))) return false;
    const Prompt p = {j, from, to, (uint16_t*)room, sixteens, pieces};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num();
#else
        const int me = 0;
#endif
        uint16_t* weights = (uint16_t*)((char*)room + packed + me * own);
        float* sums = (float*)(weights + decoded);
#pragma omp for
        for (int64_t i = 0; i < sixteens * pieces; i++)
            pack_vectors(p, i / pieces * 16, i % pieces, p.vectors + i * kTile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < strips; first += each)
            multiply_rows<F>(p, first, first + each < strips ? first + each : strips, weights, sums);
    }
    free(room);
    return true;
}

// As many vectors at a time as the second cache has room for; false = out of memory.
bool multiply_prompt(Job& j, const uint16_t* from, uint16_t* to, int64_t batch, int threads) {
    for (int64_t m = 0; m < batch; m += kPromptVectors) {
        j.batch = (int)(batch - m < kPromptVectors ? batch - m : kPromptVectors);
        const uint16_t* x = from + m * j.shape.cols;
        uint16_t* y = to + m * j.shape.rows;
        const auto multiply = j.shape.bits == 2 ? multiply_part<B2> : multiply_part<B3>;
        if (!multiply(j, x, y, threads)) return false;
    }
    return true;
}

}  // namespace
#endif

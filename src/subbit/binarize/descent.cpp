// The steps of fitting levels to a block that take the time (levels.py and refine.py say what they do
// and have them in torch): the exact start of free levels, one sweep of coordinate descent over the
// columns, and the normal equations of the levels. Rows do not know of each other. In the sweep a tile
// of them is worked on at a time, one row a lane, so that every loop over lanes becomes vector code and
// the tile stays in the L1 cache.
//
// Nothing here may depend on the instruction set or the number of threads: no contraction to
// multiply-add (see the flags in pyproject.toml), the same order of operations for every row.
// Plain C++17, no torch, reached through ctypes (descent.py). On x86 everything but the first exported
// function is compiled for AVX2; that one says whether the processor has it.

#include <float.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

// The version of the arguments of what follows, or 0 = nothing here may be called on this machine.
EXPORT int subbit_descent_version() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") ? 3 : 0;
#else
    return 3;
#endif
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2")
#endif

namespace {

constexpr int kLanes = 8;      // rows of a tile
constexpr int kColumns = 256;  // widest block
constexpr int kGroup = 16;     // longest group of columns (M)
constexpr int kLevels = 16;    // most levels of a table
constexpr int kTables = 2;

// One number for each row of a tile. The compiler splits it into the registers that there are;
// a comparison gives -1 or 0 in every lane and `?:` chooses lane by lane.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Table {
    int count;
    Floats value[kLevels];   // ascending
    Floats middle[kLevels];  // between neighbours
    Ints code[kLevels];      // 1 + level
};

struct Tile {
    Floats q[kColumns];
    Floats rs[kColumns];  // (w - q) S
    Ints code[kColumns];  // 0 = pruned
    Table table[kTables];
};

struct Level {
    Ints code;
    Floats value;
};

// The level nearest to each target.
INLINE Level nearest(const Table& t, Floats target) {
    Level found = {t.code[0], t.value[0]};
    for (int k = 1; k < t.count; k++) {
        const Ints above = target > t.middle[k - 1];
        found.value = above ? t.value[k] : found.value;
        found.code = above ? t.code[k] : found.code;
    }
    return found;
}

// rs of column k, less what `count` steps of the columns from `from` on take away.
INLINE void absorb(Tile& x, const float* S, int64_t b, int k, int from, int count,
                   const Floats* step) {
    Floats rs = x.rs[k];
    for (int c = 0; c < count; c++) rs -= S[k * b + from + c] * step[c];
    x.rs[k] = rs;
}

// What a step in a column costs; a column without inputs costs next to nothing, as in refine.py.
INLINE float curvature_of(const float* S, int64_t b, int c) {
    const float own = S[c * b + c];
    return own > FLT_MIN ? own : FLT_MIN;
}

// Give every kept weight of columns [from, to) the level nearest to its conditional optimum.
INLINE void descend(Tile& x, const float* S, int64_t b, const uint8_t* table, int from, int to) {
    for (int c = from; c < to; c++) {
        const Level level = nearest(x.table[table[c]], x.q[c] + x.rs[c] / curvature_of(S, b, c));
        const Ints kept = x.code[c] > 0;
        const Floats q = kept ? level.value : Floats{};
        const Floats step = q - x.q[c];
        x.code[c] = kept ? level.code : Ints{};
        x.q[c] = q;
        for (int k = from; k < to; k++) absorb(x, S, b, k, c, 1, &step);
    }
}

// An exchange of each row: column `out` is pruned, column `in` kept at a level.
struct Exchange {
    Floats change;  // of the objective
    Level level;
    Ints in, out;
};

// The best exchange of a kept and a pruned weight of columns [from, to); `in` is -1 where none pays.
INLINE Exchange best_exchange(const Tile& x, const float* S, int64_t b, const uint8_t* table,
                              int from, int to) {
    Exchange best = {Floats{}, {Ints{}, Floats{}}, Ints{} - 1, Ints{} - 1};
    for (int i = from; i < to; i++) {
        const Floats cost = x.q[i] * (2.0f * x.rs[i] + x.q[i] * curvature_of(S, b, i));
        for (int j = from; j < to; j++) {
            const float curvature = curvature_of(S, b, j);
            const Floats t = (x.rs[j] + S[j * b + i] * x.q[i]) / curvature;
            const Level level = nearest(x.table[table[j]], t);
            const Floats change = cost - curvature * (level.value * (2.0f * t - level.value));
            const Ints better = (x.code[i] > 0) & (x.code[j] == 0) & (change < best.change);
            best.change = better ? change : best.change;
            best.level.value = better ? level.value : best.level.value;
            best.level.code = better ? level.code : best.level.code;
            best.in = better ? Ints{} + j : best.in;
            best.out = better ? Ints{} + i : best.out;
        }
    }
    return best;
}

INLINE void exchange(Tile& x, const float* S, int64_t b, const uint8_t* table, int from, int to) {
    const Exchange best = best_exchange(x, S, b, table, from, to);
    Floats step[kGroup];
    for (int c = from; c < to; c++) {
        const Ints in = best.in == c, out = best.out == c;
        const Floats q = in ? best.level.value : out ? Floats{} : x.q[c];
        step[c - from] = q - x.q[c];
        x.q[c] = q;
        x.code[c] = in ? best.level.code : out ? Ints{} : x.code[c];
    }
    for (int k = from; k < to; k++) absorb(x, S, b, k, from, to - from, step);
}

void sweep_tile(Tile& x, const float* S, int64_t b, const uint8_t* table, int64_t m,
                             int remask) {
    Floats step[kGroup];
    for (int from = 0; from < b; from += m) {
        const int to = from + m < b ? from + m : b;
        for (int c = from; c < to; c++) step[c - from] = x.q[c];
        if (remask) exchange(x, S, b, table, from, to);
        descend(x, S, b, table, from, to);
        for (int c = from; c < to; c++) step[c - from] = x.q[c] - step[c - from];
        for (int k = to; k < b; k++) absorb(x, S, b, k, from, to - from, step);
    }
}

// Arrays are (columns, rows) or (levels, rows), rows contiguous.
struct Arrays {
    int64_t rows, b;
    uint8_t* codes;
    float *q, *rs;
    const float* values;  // of all tables, one after the other, each ascending
    const uint8_t* order; // 1 + level of each value
    int tables;
    const int32_t* counts;
};

// Lanes beyond the last row repeat it.
void load(Tile& x, const Arrays& a, int64_t row) {
    int64_t at[kLanes];
    for (int l = 0; l < kLanes; l++) at[l] = row + l < a.rows ? row + l : a.rows - 1;
    for (int64_t c = 0; c < a.b; c++)
        for (int l = 0; l < kLanes; l++) {
            x.q[c][l] = a.q[c * a.rows + at[l]];
            x.rs[c][l] = a.rs[c * a.rows + at[l]];
            x.code[c][l] = a.codes[c * a.rows + at[l]];
        }
    int64_t k0 = 0;
    for (int t = 0; t < a.tables; k0 += a.counts[t++]) {
        Table& table = x.table[t];
        table.count = a.counts[t];
        for (int k = 0; k < table.count; k++)
            for (int l = 0; l < kLanes; l++) {
                table.value[k][l] = a.values[(k0 + k) * a.rows + at[l]];
                table.code[k][l] = a.order[(k0 + k) * a.rows + at[l]];
            }
        for (int k = 0; k + 1 < table.count; k++)
            for (int l = 0; l < kLanes; l++)
                table.middle[k][l] = (table.value[k + 1][l] + table.value[k][l]) / 2;
    }
}

void store(const Tile& x, const Arrays& a, int64_t row) {
    const int lanes = a.rows - row < kLanes ? int(a.rows - row) : kLanes;
    for (int64_t c = 0; c < a.b; c++)
        for (int l = 0; l < lanes; l++)
            a.codes[c * a.rows + row + l] = uint8_t(x.code[c][l]);
}

constexpr int kEntries = kTables * (kLevels + 1);  // and that of the pruned weights, one a table

void level_gram(int64_t b, int entries, const float* S, const uint8_t* entry, const float* rs,
                float* A, float* c) {
    alignas(64) float sums[kEntries][kColumns];  // of the rows of S, by entry
    for (int t = 0; t < entries; t++) memset(sums[t], 0, sizeof(float) * b);
    memset(A, 0, sizeof(float) * entries * entries);
    memset(c, 0, sizeof(float) * entries);
    for (int64_t i = 0; i < b; i++) {
        if (entry[i] >= entries) continue;
        float* sum = sums[entry[i]];
        for (int64_t k = 0; k < b; k++) sum[k] += S[i * b + k];
    }
    for (int64_t k = 0; k < b; k++) {
        if (entry[k] >= entries) continue;
        c[entry[k]] += rs[k];
        for (int t = 0; t < entries; t++) A[t * entries + entry[k]] += sums[t][k];
    }
}

// Sums of a row's first j weights, ascending: of their masses, and of mass times weight and square.
struct Sums {
    double mass[kColumns + 1], first[kColumns + 1], second[kColumns + 1];
};

// Squared error of weights [i, j) around their mean.
INLINE double spread(const Sums& s, int i, int j) {
    const double mass = s.mass[j] - s.mass[i], first = s.first[j] - s.first[i];
    const double error = s.second[j] - s.second[i] - first * first / (mass > 1e-300 ? mass : 1e-300);
    return error > 0 ? error : 0;
}

// best[j] and cut[j] for j in [from, to): the least error of the first j weights in one cluster more
// than `before` has, and where the last cluster begins, which is in [low, high]. The cut never falls
// as j grows, so that the middle j halves the range for both sides.
void best_cuts(const Sums& s, const double* before, double* best, uint16_t* cut, int from, int to,
               int low, int high) {
    if (from >= to) return;
    const int j = (from + to) / 2;
    double least = before[low] + spread(s, low, j);
    int at = low;
    for (int i = low + 1; i <= high && i < j; i++) {
        const double error = before[i] + spread(s, i, j);
        if (error < least) least = error, at = i;
    }
    best[j] = least;
    cut[j] = uint16_t(at);
    best_cuts(s, before, best, cut, from, j, low, at);
    best_cuts(s, before, best, cut, j + 1, to, at, high);
}

void row_levels(int kept, int count, const float* w, const float* mass, float* levels) {
    Sums s;
    s.mass[0] = s.first[0] = s.second[0] = 0;
    for (int j = 0; j < kept; j++) {
        s.mass[j + 1] = s.mass[j] + mass[j];
        s.first[j + 1] = s.first[j] + double(mass[j]) * w[j];
        s.second[j + 1] = s.second[j] + double(mass[j]) * w[j] * w[j];
    }
    const int clusters = kept < count ? kept : count;
    double error[2][kColumns + 1];
    uint16_t cut[kLevels][kColumns + 1];
    for (int j = 0; j <= kept; j++) error[0][j] = spread(s, 0, j), cut[0][j] = 0;
    for (int k = 1; k < clusters; k++)
        best_cuts(s, error[(k - 1) & 1], error[k & 1], cut[k], k + 1, kept + 1, k, kept - 1);
    for (int k = clusters - 1, end = kept; k >= 0; k--) {
        const int start = cut[k][end];
        const double m = s.mass[end] - s.mass[start];
        levels[k] = m > 1e-300 ? float((s.first[end] - s.first[start]) / m) : w[start];
        end = start;
    }
    for (int k = clusters; k < count; k++) levels[k] = clusters ? levels[clusters - 1] : 0;
}

}  // namespace

// The levels of least squared error of every row, (rows, count) ascending; a row with fewer weights
// than levels repeats its last. `w` is (rows, b), the kept weights of a row first and ascending,
// `mass` what a squared error of each costs, `kept` how many there are. Returns as below.
EXPORT int subbit_descent_levels(int64_t rows, int64_t b, int count, const float* w,
                                 const float* mass, const int32_t* kept, float* levels,
                                 int threads) {
    if (rows < 1 || b < 1 || b > kColumns || count < 1 || count > kLevels) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        row_levels(kept[row], count, w + row * b, mass + row * b, levels + row * count);
    return 0;
}

// Returns 0, or 1 = sizes beyond the limits above, 2 = no memory. `codes` alone is changed.
EXPORT int subbit_descent_sweep(int64_t rows, int64_t b, int64_t m, const float* S, uint8_t* codes,
                                float* q, float* rs, const float* values, const uint8_t* order,
                                int tables, const int32_t* counts, const uint8_t* table_of_column,
                                int remask, int threads) {
    if (rows < 1 || b < 1 || b > kColumns || m < 1 || m > kGroup) return 1;
    if (tables < 1 || tables > kTables) return 1;
    for (int t = 0; t < tables; t++)
        if (counts[t] < 1 || counts[t] > kLevels) return 1;
    const Arrays a = {rows, b, codes, q, rs, values, order, tables, counts};
    const int64_t tiles = (rows + kLanes - 1) / kLanes;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Tile* x = static_cast<Tile*>(aligned_alloc(64, (sizeof(Tile) + 63) / 64 * 64));
        failed = x == nullptr;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (x == nullptr) continue;
            load(*x, a, tile * kLanes);
            sweep_tile(*x, S, b, table_of_column, m, remask);
            store(*x, a, tile * kLanes);
        }
        free(x);
    }
    return failed ? 2 : 0;
}

// For every row the sums of S over the pairs of columns whose weights have the entries t and u,
// A (rows, entries, entries), and of rs over the columns of entry t, c (rows, entries).
// `entry` is (rows, b), no number below `entries` where a weight has none. Returns 0, or 1 = sizes
// beyond the limits.
EXPORT int subbit_descent_gram(int64_t rows, int64_t b, int entries, const float* S,
                               const uint8_t* entry, const float* rs, float* A, float* c,
                               int threads) {
    if (rows < 1 || b < 1 || b > kColumns || entries < 1 || entries > kEntries) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        level_gram(b, entries, S, entry + row * b, rs + row * b, A + row * entries * entries,
                   c + row * entries);
    return 0;
}

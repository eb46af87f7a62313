// x @ W.T for a few tokens x and a weight W in any format of `formats.hpp`.
//
// For one token the time goes into reading W, and a row is one stream of memory. For many tokens it goes into arithmetic:
// a tile of R rows and M tokens keeps R * M sums in registers, so that every number that is loaded is used several times.
// The sums of a tile are vectors until the end of the row; adding up their lanes is worth doing only once.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "formats.hpp"
#include "numbers.hpp"
#include "team.hpp"

// A weight [rows, columns] where it lies. A code is worth (code - zero) * scale, or code * scale + minimum, with a scale (and
// zero or minimum) per `group` columns.
struct Weight {
    int64 kind, rows, columns, row_bytes;
    const uint8_t* data;
    Numbers bias;                     // [rows]; no data: none
    int64 group, groups;              // columns that share a scale, scales in a row (0: one for the whole weight)
    Numbers scales;                   // [rows, groups]; no data: nested
    const uint8_t* scale_codes;       // double quantization: scale = dynamic[code] * nested[i / 256] + offset
    const float *dynamic, *nested, *offset;
    const uint8_t* zeros;             // [rows, zero_bytes], packed as the codes are; no data: `zero` for all
    int64 zero_bytes;
    float zero;
    Numbers minimums;                 // [rows, groups], in place of zeros
    uint8_t values[32];               // a codebook's values as `Codebook` wants them
    float value_unit;                 // what one step of those integers is worth; 1 for other formats

    bool quantized() const { return kind >= SIGNED8; }
    bool shifted() const { return zeros || zero != 0 || minimums; }  // a code of 0 is not worth 0
};

// How a row is cut up. Integers are summed exactly over a step, whose columns share a scale of the weight and are so few
// that the sum stays below 2^31. Some steps are a stretch, whose activations share a scale; with one scale for a whole
// token, an outlier would cost all others their precision.
struct Cut {
    int64 units, step, steps, steps_per_group, steps_per_stretch, stretches;  // `step`: in units

    Cut(const Weight& w, int64 unit) {
        const int64 most = (w.kind == CODEBOOK ? 64 : 1024) / unit;
        units = (w.columns + unit - 1) / unit;
        const int64 group = w.group >= w.columns ? (units + most - 1) / most * most : w.group / unit;
        step = std::min(group, most);
        while (group % step) --step;
        steps = (units + step - 1) / step;
        steps_per_group = group / step;
        steps_per_stretch = std::max<int64>(1, 1024 / unit / step);
        stretches = (steps + steps_per_stretch - 1) / steps_per_stretch;
    }
};

// ---------------------------------------------------------------------------------------------- activations

// The tokens of a product, in the order in which a weight's columns arrive, filled up with zeros to whole units.
struct Activations {
    std::vector<float> memory;        // of `numbers`
    void* numbers;                    // [tokens, padded] float or bf16, or int16 with a scale per stretch
    int64 padded;
    std::vector<float> scales, sums;  // [tokens, stretches]; [tokens, steps_padded], the sum over a step of what is meant
    int64 stretches, steps_padded;

    void reserve(const Cut& cut, int64 unit, int64 tokens, bool integers) {
        padded = cut.units * unit;
        memory.resize(std::max<size_t>(memory.size(), tokens * padded + 16));
        numbers = (void*)(((size_t)memory.data() + 63) / 64 * 64);  // no vector straddles two lines of the cache
        if (!integers) return;
        stretches = cut.stretches;
        steps_padded = (cut.steps + 15) / 16 * 16;
        scales.resize(std::max<size_t>(scales.size(), tokens * stretches));
        sums.resize(std::max<size_t>(sums.size(), tokens * steps_padded));
    }

    template <class F, class Number>
    void arrange_floats(const float* x, int64 columns, int64 token) {
        Number* out = (Number*)numbers + token * padded;
        const int64 whole = columns / F::UNIT * F::UNIT;
        for (int64 u = 0; u < whole; u += F::UNIT)
            UNROLL for (int i = 0; i < F::UNIT; ++i) out[u + i] = x[u + F::place(i)];
        for (int64 i = 0; i < padded - whole; ++i)
            out[whole + i] = whole + F::place(i) < columns ? x[whole + F::place(i)] : 0.0f;
    }

    template <class F>
    void arrange_integers(const Weight& w, const Cut& cut, const float* x, int64 token) {
        int16_t* out = (int16_t*)numbers + token * padded;
        float *scale = &scales[token * stretches], *sum = &sums[token * steps_padded];
        std::fill_n(sum, steps_padded, 0.0f);
        for (int64 s = 0; s < stretches; ++s) {
            const int64 width = cut.steps_per_stretch * cut.step * F::UNIT;
            const int64 first = s * width, last = std::min(first + width, w.columns);
            float highest = 0;
            for (int64 k = first; k < last; ++k) highest = std::max(highest, std::fabs(x[k]));
            const float worth = highest / 32767, inverse = highest > 0 ? 32767 / highest : 0;
            scale[s] = worth * w.value_unit;
            int64 step = s * cut.steps_per_stretch, units_left = cut.step;
            for (int64 u = first; u < last; u += F::UNIT) {
                int total = 0;
                for (int i = 0; i < F::UNIT; ++i) {
                    const int64 k = u + F::place(i);
                    const int number = k < last ? (int)std::nearbyint(x[k] * inverse) : 0;
                    out[u + i] = (int16_t)number;
                    total += number;
                }
                sum[step] += worth * total;
                if (--units_left == 0) ++step, units_left = cut.step;
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------- rows

const int TAIL = 2 * Wide::WIDTH;  // bytes of the longest unit
const int ROWS = 16;  // a thread's share at a time: few enough that they stay in its cache for all tokens

// A few rows of a weight, for one thread: their scales as floats, one per step, and for many tokens their numbers too.
class Rows {
  public:
    const Weight& w;
    const uint8_t* from;       // the first row; the next ones `row_bytes` on
    int64 row_bytes, count;
    int64 whole;               // units that lie there in full
    bool has_tail;             // what is left of a row stands, filled up with zeros, in `tails`
    uint8_t (&tails)[ROWS][TAIL];
    const float *scales, *zeros;  // [count, steps]: scale; what is taken off code * scale
    const Cut& cut;

    Rows(const Weight& weight, const Cut& how) : w(weight), tails(kept().tails), cut(how), memory(kept()) {}

    template <class F>
    void take(int64 first) {
        from = w.data + first * w.row_bytes;
        row_bytes = w.row_bytes;
        count = std::min<int64>(ROWS, w.rows - first);
        whole = w.columns / F::UNIT;
        has_tail = w.columns % F::UNIT;
        if (has_tail)
            for (int64 r = 0; r < count; ++r)
                std::memset(tails[r], 0, TAIL), std::memcpy(tails[r], from + r * row_bytes + whole * F::BYTES, row_bytes_used() - whole * F::BYTES);
        if (w.quantized()) read_scales(first);
    }

    // Codes become the numbers that they stand for, in this thread's memory: for many tokens it is worth doing once.
    template <class F, class Restored>
    void restore() {
        using Number = typename Restored::Number;
        const int64 units = cut.units, width = units * F::UNIT;
        std::vector<float>& restored = memory.restored;
        restored.resize(std::max<size_t>(restored.size(), ROWS * width + 16));
        Number* to = (Number*)(((size_t)restored.data() + 63) / 64 * 64);
        const bool shifted = w.shifted();
        for (int64 row = 0; row < count; ++row)
            for (int64 u = 0; u < units; ++u) {
                const int64 step = row * cut.steps + u / cut.step;
                const float scale = scales[step] * w.value_unit, zero = shifted ? zeros[step] : 0;
                const uint8_t* at = u < whole ? from + row * row_bytes + u * F::BYTES : tails[row];
                restore_unit<F>(at, scale, zero, to + row * width + u * F::UNIT);
            }
        from = (const uint8_t*)to, row_bytes = sizeof(Number) * width, whole = width / Restored::UNIT, has_tail = false;
    }

  private:
    template <class F, class Number>
    INLINE void restore_unit(const uint8_t* at, float scale, float zero, Number* to) {
        typename F::Vector codes[2];
#if defined(BF16_PAIRS)
        if constexpr (std::is_same_v<Number, bf16> && std::is_base_of_v<Nibbles<Wide>, F>) {
            // 4 bits under one scale number but 16 values: they are rounded once, and looked up 32 at a time.
            Nibbles<Wide>::unpack(at, w.values, codes[0], codes[1]);
            const auto values = (__m256i)_mm512_cvtneps_pbh((__m512)(F::sixteen(w.values) * scale - zero));
            for (int half = 0; half < 2; ++half)
                store(to + half * (F::UNIT / 2), _mm512_permutexvar_epi16((__m512i)codes[half], _mm512_castsi256_si512(values)));
            return;
        }
#endif
        F::unpack(at, w.values, codes[0], codes[1]);
        UNROLL for (int half = 0; half < 2; ++half) {
            typename F::Registers::Floats lower, upper;
            as_floats(codes[half], lower, upper);
            store_pair(to + half * (F::UNIT / 2), lower * scale - zero, upper * scale - zero);
        }
    }

    struct Memory {  // of this thread, kept from product to product
        uint8_t tails[ROWS][TAIL];
        std::vector<float> groups, scales, points, spread, zeros, restored;
    };
    static Memory& kept() {
        static thread_local Memory own;
        return own;
    }
    Memory& memory;

    int64 row_bytes_used() const {
        if (w.kind == FLOAT32) return w.columns * 4;
        if (w.kind == BFLOAT16 || w.kind == FLOAT16) return w.columns * 2;
        return w.kind == NIBBLES || w.kind == CODEBOOK ? (w.columns + 1) / 2 : w.columns;
    }

    void read_scales(int64 first) {
        const int64 from = first * w.groups, each = std::max<int64>(w.groups, 1);  // no groups: one scale for all rows
        if (w.scale_codes || w.scales.kind != FLOAT32 || w.groups != cut.steps) {
            memory.groups.resize(ROWS * each);
            if (w.scale_codes) read_nested(from, count * each);
            else w.scales.read(from, w.groups ? count * each : 1, memory.groups.data());
            scales = spread(memory.groups.data(), memory.scales);
        } else {
            scales = (const float*)w.scales.data + from;  // as they are
        }
        if (!w.shifted()) return;
        memory.zeros.resize(ROWS * cut.steps + 16);
        if (w.minimums) {
            memory.points.resize(ROWS * each);
            w.minimums.read(from, count * each, memory.points.data());
            const float* minimums = spread(memory.points.data(), memory.spread);
            for (int64 i = 0; i < count * cut.steps; ++i) memory.zeros[i] = -minimums[i];
        } else if (w.zeros) {
            memory.points.resize(ROWS * each);
            for (int64 row = 0; row < count; ++row)
                for (int64 group = 0; group < each; ++group) memory.points[row * each + group] = zero_point(first + row, group);
            const float* points = spread(memory.points.data(), memory.spread);
            for (int64 i = 0; i < count * cut.steps; ++i) memory.zeros[i] = points[i] * scales[i];
        } else {
            for (int64 i = 0; i < count * cut.steps; ++i) memory.zeros[i] = w.zero * scales[i];
        }
        zeros = memory.zeros.data();
    }

    void read_nested(int64 from, int64 number) {
        float* __restrict out = memory.groups.data();
        const float offset = *w.offset;
        for (int64 i = 0; i < number; ++i) out[i] = w.dynamic[w.scale_codes[from + i]] * w.nested[(from + i) / 256] + offset;
    }

    float zero_point(int64 row, int64 group) const {
        const uint8_t* packed = w.zeros + row * w.zero_bytes;
        if (w.kind == UNSIGNED8) return packed[group];
        return group % 2 ? packed[group / 2] & 15 : packed[group / 2] >> 4;
    }

    // What stands once per group, once per step.
    const float* spread(const float* groups, std::vector<float>& memory) {
        if (w.groups == cut.steps) return groups;
        memory.resize(ROWS * cut.steps + 16);
        float* out = memory.data();
        for (int64 row = 0; row < count; ++row, groups += w.groups)
            for (int64 step = 0, group = 0; step < cut.steps; ++group)
                for (int64 end = std::min((group + 1) * cut.steps_per_group, cut.steps); step < end; ++step)
                    *out++ = groups[group];
        return memory.data();
    }

};

// ---------------------------------------------------------------------------------------------- tiles

template <class Sum, class V>
static INLINE Sum multiply_add(Sum acc, V a, V b) {
    if constexpr (std::is_same_v<Sum, V>) return acc + a * b;
    else return dot_pairs(acc, a, b);
}

// Some rows of a tile are some streams of memory, more than processors foresee well. But the rows of all tiles are one:
// each step asks for what lies so many bytes after its tile's beginning, in order. It is brought as near as the second
// cache; the first has more to do.
const int AHEAD = 8192;

// The rows of a tile. Beyond the last row of a weight is the last one again: what it gives is not kept, and nothing is read
// that is not there.
template <int R>
struct TileRows {
    int64 index[R];
    const uint8_t *from[R], *tails[R];

    TileRows(const Rows& rows, int64 first) {
        UNROLL for (int r = 0; r < R; ++r) {
            index[r] = std::min(first + r, rows.count - 1);
            from[r] = rows.from + index[r] * rows.row_bytes;
            tails[r] = rows.tails[index[r]];
        }
    }
};

// acc[m * R + r] += W[r] * x[m] over one unit of columns; `done`: bytes of each row before it.
template <class F, int R, int M, class Sum>
static INLINE void multiply_unit(Sum (&acc)[M * R], const uint8_t* const (&from)[R], int64 done, const typename F::Number* x,
                                 int64 padded, const uint8_t* values) {
    using V = typename F::Vector;
    V w[R][2];
    for (int b = 0; b < R * F::BYTES; b += 64) __builtin_prefetch(from[0] + R * done + AHEAD + b, 0, 2);
    UNROLL for (int r = 0; r < R; ++r) F::unpack(from[r] + done, values, w[r][0], w[r][1]);
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int half = 0; half < 2; ++half) {
            const V numbers = in_register(load<V>(x + m * padded + half * (F::UNIT / 2)));  // once for all rows
            UNROLL for (int r = 0; r < R; ++r) acc[m * R + r] = multiply_add(acc[m * R + r], w[r][half], numbers);
        }
}

// total[m * R + r]: R rows times M tokens, of floats, over the units `first` to `last`.
template <class F, int R, int M>
static INLINE void sum_floats(typename F::Registers::Floats (&total)[M * R], const Rows& rows, const TileRows<R>& tile,
                              const typename F::Number* x, int64 padded, int64 first, int64 last) {
    const int64 end = std::min(last, rows.whole);
    int64 u = first;
    if constexpr (R * M < 4) {  // too few sums to keep the processor busy: four of each, which do not wait for one another
        typename F::Registers::Floats chains[4][M * R] = {};
        for (; u + 4 <= end; u += 4)
            UNROLL for (int c = 0; c < 4; ++c)
                multiply_unit<F, R, M>(chains[c], tile.from, (u + c) * F::BYTES, x + (u + c) * F::UNIT, padded, nullptr);
        UNROLL for (int i = 0; i < M * R; ++i) total[i] = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
    }
    for (; u < end; ++u) multiply_unit<F, R, M>(total, tile.from, u * F::BYTES, x + u * F::UNIT, padded, nullptr);
    if (u < last) multiply_unit<F, R, M>(total, tile.tails, 0, x + u * F::UNIT, padded, nullptr);
}

// The same of integers: summed exactly over a step, scaled by the weight's scale, and by the activations' per stretch.
// STEP: the units of a step where the compiler may know them, else 0.
template <class F, int R, int M, int STEP>
static INLINE void sum_integers(typename F::Registers::Floats (&total)[M * R], const Rows& rows, const TileRows<R>& tile,
                                const Activations& x, int64 token) {
    using Floats = typename F::Registers::Floats;
    const Weight& w = rows.w;
    const int64 step = STEP ? STEP : rows.cut.step, steps = rows.cut.steps, steps_per_stretch = rows.cut.steps_per_stretch;
    const int16_t* numbers = (const int16_t*)x.numbers + token * x.padded;
    for (int64 s = 0, stretch = 0; s < steps; ++stretch) {
        Floats part[M * R] = {};
        for (const int64 last = std::min(s + steps_per_stretch, steps); s < last; ++s) {
            typename F::Registers::Ints acc[M * R] = {};
            int64 u = s * step;
            const int64 end = std::min(u + step, rows.whole);
            if (STEP && end == u + STEP) {
                UNROLL for (int i = 0; i < STEP; ++i)
                    multiply_unit<F, R, M>(acc, tile.from, (u + i) * F::BYTES, numbers + (u + i) * F::UNIT, x.padded, w.values);
                u = end;
            }
            for (; u < end; ++u)
                multiply_unit<F, R, M>(acc, tile.from, u * F::BYTES, numbers + u * F::UNIT, x.padded, w.values);
            if (rows.has_tail && s == steps - 1)
                multiply_unit<F, R, M>(acc, tile.tails, 0, numbers + u * F::UNIT, x.padded, w.values);
            UNROLL for (int r = 0; r < R; ++r) {
                const float scale = rows.scales[tile.index[r] * steps + s];
                UNROLL for (int m = 0; m < M; ++m)
                    part[m * R + r] += __builtin_convertvector(acc[m * R + r], Floats) * scale;
            }
        }
        UNROLL for (int m = 0; m < M; ++m) {
            const float scale = x.scales[(token + m) * x.stretches + stretch];
            UNROLL for (int r = 0; r < R; ++r) total[m * R + r] += part[m * R + r] * scale;
        }
    }
    if (w.shifted())  // (code - zero) * x = code * x - zero * x, and the second needs only the sums of x
        for (int64 s = 0; s < steps; s += F::Registers::LANES)
            UNROLL for (int r = 0; r < R; ++r) {
                const Floats zero = load<Floats>(rows.zeros + tile.index[r] * steps + s);
                UNROLL for (int m = 0; m < M; ++m)
                    total[m * R + r] -= zero * load<Floats>(&x.sums[(token + m) * x.steps_padded + s]);
            }
}

template <int R, int M, class Floats>
static INLINE void finish(const Floats (&total)[M * R], int64 count, float* out, int64 stride, bool add) {
    float ready[M * R];
    sums<M * R>(total, ready);
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int r = 0; r < R; ++r)
            if (r < count) out[m * stride + r] = ready[m * R + r] + (add ? out[m * stride + r] : 0);
}

// All rows for M tokens. A function of its own: inlined, its sums would not all get registers.
template <class F, int R, int M, int STEP = 0>
static __attribute__((noinline)) void rows_by_tokens(const Rows& rows, const Activations& x, int64 token, float* out, int64 stride, int64 first = 0,
                           int64 last = 0) {
    for (int64 row = 0; row < rows.count; row += R) {
        const TileRows<R> tile(rows, row);
        typename F::Registers::Floats total[M * R] = {};
        if constexpr (std::is_same_v<typename F::Number, int16_t>)
            sum_integers<F, R, M, STEP>(total, rows, tile, x, token);
        else
            sum_floats<F, R, M>(total, rows, tile, (const typename F::Number*)x.numbers + token * x.padded, x.padded, first, last);
        finish<R, M>(total, rows.count - row, out + token * stride + row, stride, first > 0);
    }
}

// ---------------------------------------------------------------------------------------------- products

// Rows of a tile: AVX-512 has 32 registers, room for 16 sums, half of the weights and one vector of activations. Integers
// need two sums each.
template <class F>
constexpr int TILE_ROWS = F::Registers::WIDTH == 64 && !std::is_same_v<typename F::Number, int16_t> ? 4 : 2;

template <class F>
static void rows_by_all(const Rows& rows, const Activations& x, int64 tokens, float* out, int64 stride, int64 first = 0,
                        int64 last = 0) {
    constexpr int R = TILE_ROWS<F>;
    int64 token = 0;
    for (; token + 4 <= tokens; token += 4) rows_by_tokens<F, R, 4>(rows, x, token, out, stride, first, last);
    switch (tokens - token) {
        case 3: return rows_by_tokens<F, R, 3>(rows, x, token, out, stride, first, last);
        case 2: return rows_by_tokens<F, R, 2>(rows, x, token, out, stride, first, last);
        case 1: return rows_by_tokens<F, R, 1>(rows, x, token, out, stride, first, last);
    }
}

// With several tokens long rows are cut into parts, so that the activations of a tile stay in the first cache.
template <class F>
static void multiply_floats(const Rows& rows, const Activations& x, int64 tokens, float* out, int64 stride) {
    const int64 units = x.padded / F::UNIT, parts = (units + 35) / 36;
    if (tokens == 1) return rows_by_tokens<F, 1, 1>(rows, x, 0, out, stride, 0, units);  // a single stream of memory
    for (int64 part = 0; part < parts; ++part)
        rows_by_all<F>(rows, x, tokens, out, stride, units * part / parts, units * (part + 1) / parts);
}

template <class F>
static void multiply_integers(const Rows& rows, const Activations& x, int64 tokens, float* out, int64 stride) {
    if (tokens == 1 && F::BYTES >= F::UNIT) return rows_by_tokens<F, 1, 1>(rows, x, 0, out, stride);
    if (tokens == 1 && rows.cut.step * F::UNIT == 64)  // groups of 64
        return rows_by_tokens<F, 2, 1, 64 / F::UNIT>(rows, x, 0, out, stride);
    rows_by_all<F>(rows, x, tokens, out, stride);
}

// How a weight in the format F is multiplied: as `As`, F itself or what its codes are restored to.
template <class F, class As = F>
static void product(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride, int threads) {
    constexpr bool integers = std::is_same_v<typename As::Number, int16_t>;
    const Cut cut(w, F::UNIT);
    if (x) {
        shared.reserve(cut, F::UNIT, tokens, integers);
        Team::each(tokens, tokens > 16 ? threads : 1, [&](int64 token) {
            if constexpr (integers) shared.arrange_integers<F>(w, cut, x + token * w.columns, token);
            else shared.arrange_floats<F, typename As::Number>(x + token * w.columns, w.columns, token);
        });
    }
    const int64 blocks = (w.rows + ROWS - 1) / ROWS, pieces = threads < 2 ? 1 : std::min<int64>(blocks, 4 * threads);
    Team::each(pieces, threads, [&](int64 piece) {
        Rows rows(w, cut);
        for (int64 block = blocks * piece / pieces; block < blocks * (piece + 1) / pieces; ++block) {
            const int64 first = block * ROWS;
            rows.take<F>(first);
            if constexpr (!std::is_same_v<F, As>) rows.restore<F, As>();
            if constexpr (integers) multiply_integers<F>(rows, shared, tokens, out + first, stride);
            else multiply_floats<As>(rows, shared, tokens, out + first, stride);
            if (w.bias)
                for (int64 token = 0; token < tokens; ++token)
                    for (int64 r = first; r < first + rows.count; ++r) out[token * stride + r] += w.bias[r];
        }
    });
}

// For so many tokens codes are multiplied as integers. Where that takes an instruction for every 16 pairs (VNNI), it beats
// the 8 pairs of floats for any number of tokens; where it takes two, only as long as restoring the floats costs more.
// Pairs of bf16 are as many as those of integers, and know no steps with a scale each.
#if defined(VNNI)
const int64 FEW = INT64_MAX;
#else
const int64 FEW = 16;
#endif
const int64 FEW_BEFORE_PAIRS = 11;

template <class F>
static void product_of_code(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride,
                             int threads, bool rounded) {
#if defined(BF16_PAIRS)
    const bool fits = w.columns % BFloat16Pairs::UNIT == 0 || F::UNIT == BFloat16Pairs::UNIT;
    if (rounded && fits && F::BYTES < F::UNIT && tokens > FEW_BEFORE_PAIRS)
        return product<F, BFloat16Pairs>(w, shared, x, tokens, out, stride, threads);
#endif
    if (tokens <= FEW) return product<F>(w, shared, x, tokens, out, stride, threads);
    return product<F, Float32<Wide>>(w, shared, x, tokens, out, stride, threads);
}

template <class Width>
static void product_of_codes(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride,
                             int threads, bool rounded) {
    switch (w.kind) {
        case SIGNED8: return product_of_code<Signed8<Width>>(w, shared, x, tokens, out, stride, threads, rounded);
        case UNSIGNED8: return product_of_code<Unsigned8<Width>>(w, shared, x, tokens, out, stride, threads, rounded);
        case NIBBLES: return product_of_code<Nibbles<Width>>(w, shared, x, tokens, out, stride, threads, rounded);
        case CODEBOOK: return product_of_code<Codebook<Width>>(w, shared, x, tokens, out, stride, threads, rounded);
    }
}

// Whether two weights want their activations in the same order and cut in the same way.
static bool alike(const Weight& a, const Weight& b) {
    return a.kind == b.kind && a.columns == b.columns && a.group == b.group && a.value_unit == b.value_unit;
}

// out[token * stride + row] = sum over columns of x[token, column] * W[row, column], plus the bias.
// x: [tokens, columns]; null: what `shared` holds from the product before, by a weight that is alike.
// rounded: numbers may be rounded to bf16, as they are in a model of that type. They are where that is faster.
static void product(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride, int threads,
                    bool rounded = false) {
#if defined(BF16_PAIRS)
    const int64 ENOUGH = 8;  // tokens; for fewer, reading the weight takes longer than multiplying
    if (rounded && w.kind == BFLOAT16 && tokens >= ENOUGH)
        return product<BFloat16Pairs>(w, shared, x, tokens, out, stride, threads);
#endif
    switch (w.kind) {
        case FLOAT32: return product<Float32<Wide>>(w, shared, x, tokens, out, stride, threads);
        case BFLOAT16: return product<BFloat16<Wide>>(w, shared, x, tokens, out, stride, threads);
        case FLOAT16: return product<Float16<Wide>>(w, shared, x, tokens, out, stride, threads);
    }
    // A register must not straddle two groups.
    const bool fits = w.group >= w.columns || w.group % Integer<Wide>::UNIT == 0;
    return fits ? product_of_codes<Wide>(w, shared, x, tokens, out, stride, threads, rounded)
                : product_of_codes<Narrow>(w, shared, x, tokens, out, stride, threads, rounded);
}

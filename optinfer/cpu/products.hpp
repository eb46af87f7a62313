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

// A weight [rows, columns] where it lies. Codes are multiplied by a scale per `group` columns, after `zero` was taken off.
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
    uint8_t values[32];               // a codebook's values as `Codebook` wants them
    float value_unit;                 // what one step of those integers is worth; 1 for other formats

    bool quantized() const { return kind >= SIGNED8; }
};

// How a row is cut up. Integers are summed exactly over a step, whose columns share a scale of the weight and are so few
// that the sum stays below 2^31. Some steps are a stretch, whose activations share a scale; with one scale for a whole
// token, an outlier would cost all others their precision.
struct Cut {
    int64 units, step, steps, steps_per_group, steps_per_stretch, stretches;  // `step`: in units

    explicit Cut(const Weight& w) {
        const int64 unit = w.quantized() ? 32 : 16, most = (w.kind == CODEBOOK ? 64 : 256) / unit;
        units = (w.columns + unit - 1) / unit;
        const int64 group = w.group >= w.columns ? (units + most - 1) / most * most : w.group / unit;
        step = std::min(group, most);
        while (group % step) --step;
        steps = (units + step - 1) / step;
        steps_per_group = group / step;
        steps_per_stretch = std::max<int64>(1, 256 / unit / step);
        stretches = (steps + steps_per_stretch - 1) / steps_per_stretch;
    }
};

// ---------------------------------------------------------------------------------------------- activations

// The tokens of a product, in the order in which a weight's columns arrive, filled up with zeros to whole units.
struct Activations {
    std::vector<float> memory;        // of `numbers`
    void* numbers;                    // [tokens, padded] float, or int16 with a scale per stretch
    int64 padded;
    std::vector<float> scales, sums;  // [tokens, stretches]; [tokens, steps_padded], the sum over a step of what is meant
    int64 stretches, steps_padded;

    void reserve(const Weight& w, const Cut& cut, int64 tokens) {
        padded = cut.units * (w.quantized() ? 32 : 16);
        memory.resize(std::max<size_t>(memory.size(), tokens * padded / (w.quantized() ? 2 : 1) + 16));
        numbers = (void*)(((size_t)memory.data() + 63) / 64 * 64);  // no vector straddles two lines of the cache
        if (!w.quantized()) return;
        stretches = cut.stretches;
        steps_padded = (cut.steps + 7) / 8 * 8;
        scales.resize(std::max<size_t>(scales.size(), tokens * stretches));
        sums.resize(std::max<size_t>(sums.size(), tokens * steps_padded));
    }

    template <class F>
    void arrange_floats(const float* x, int64 columns, int64 token) {
        float* out = (float*)numbers + token * padded;
        const int64 whole = columns / F::UNIT * F::UNIT;
        for (int64 u = 0; u < whole; u += F::UNIT)
            UNROLL for (int i = 0; i < F::UNIT; ++i) out[u + i] = x[u + F::place(i)];
        for (int64 i = 0; i < padded - whole; ++i)
            out[whole + i] = whole + F::place(i) < columns ? x[whole + F::place(i)] : 0;
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

const int ROWS = 16;  // a thread's share at a time: few enough that they stay in its cache for all tokens

// A few rows of a weight, for one thread: their scales as floats, one per step, and for many tokens their numbers too.
class Rows {
  public:
    const Weight& w;
    const uint8_t* from;       // the first row; the next ones `row_bytes` on
    int64 row_bytes, count;
    int64 whole;               // units that lie there in full
    bool has_tail;             // what is left of a row stands, filled up with zeros, in `tails`
    uint8_t tails[ROWS][64] = {};
    const float *scales, *zeros;  // [count, steps]: scale; scale * zero point
    const Cut& cut;

    Rows(const Weight& weight, const Cut& how) : w(weight), cut(how) {}

    template <class F>
    void take(int64 first, bool unpack) {
        from = w.data + first * w.row_bytes;
        row_bytes = w.row_bytes;
        count = std::min<int64>(ROWS, w.rows - first);
        whole = w.columns / F::UNIT;
        has_tail = w.columns % F::UNIT;
        if (has_tail)
            for (int64 r = 0; r < count; ++r)
                std::memcpy(tails[r], from + r * row_bytes + whole * F::BYTES, row_bytes_used() - whole * F::BYTES);
        if (w.quantized()) read_scales(first);
        if (unpack) unpack_all<F>();
    }

  private:
    std::vector<float> group_memory, scale_memory, point_memory, spread_memory, zero_memory;
    std::vector<uint8_t> unpacked;

    int64 row_bytes_used() const {
        if (w.kind == FLOAT32) return w.columns * 4;
        if (w.kind == BFLOAT16 || w.kind == FLOAT16) return w.columns * 2;
        return w.kind == NIBBLES || w.kind == CODEBOOK ? (w.columns + 1) / 2 : w.columns;
    }

    void read_scales(int64 first) {
        const int64 from = first * w.groups, each = std::max<int64>(w.groups, 1);  // no groups: one scale for all rows
        if (w.scale_codes || w.scales.kind != FLOAT32 || each != cut.steps) {
            group_memory.resize(ROWS * each);
            if (w.scale_codes) read_nested(from, count * each);
            else w.scales.read(from, w.groups ? count * each : 1, group_memory.data());
            scales = spread(group_memory.data(), scale_memory);
        } else {
            scales = (const float*)w.scales.data + from;  // as they are
        }
        if (w.zero == 0 && !w.zeros) return;
        zero_memory.resize(ROWS * cut.steps + 8);
        if (w.zeros) {
            point_memory.resize(ROWS * each);
            for (int64 row = 0; row < count; ++row)
                for (int64 group = 0; group < each; ++group) point_memory[row * each + group] = zero_point(first + row, group);
            const float* points = spread(point_memory.data(), spread_memory);
            for (int64 i = 0; i < count * cut.steps; ++i) zero_memory[i] = points[i] * scales[i];
        } else {
            for (int64 i = 0; i < count * cut.steps; ++i) zero_memory[i] = w.zero * scales[i];
        }
        zeros = zero_memory.data();
    }

    void read_nested(int64 from, int64 number) {
        float* __restrict out = group_memory.data();
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
        memory.resize(ROWS * cut.steps + 8);
        float* out = memory.data();
        for (int64 row = 0; row < count; ++row, groups += w.groups)
            for (int64 step = 0, group = 0; step < cut.steps; ++group)
                for (int64 end = std::min((group + 1) * cut.steps_per_group, cut.steps); step < end; ++step)
                    *out++ = groups[group];
        return memory.data();
    }

    template <class F>
    void unpack_all() {
        const int64 units = whole + has_tail, bytes = units * 2 * sizeof(typename F::Vector);
        unpacked.resize(std::max<size_t>(unpacked.size(), ROWS * bytes + 64));
        uint8_t* to = (uint8_t*)(((size_t)unpacked.data() + 63) / 64 * 64);
        for (int64 r = 0; r < count; ++r)
            for (int64 u = 0; u < units; ++u) {
                typename F::Vector numbers[2];
                F::unpack(u < whole ? from + r * row_bytes + u * F::BYTES : tails[r], w.values, numbers[0], numbers[1]);
                std::memcpy(to + r * bytes + u * sizeof numbers, numbers, sizeof numbers);
            }
        from = to, row_bytes = bytes, whole = units, has_tail = false;
    }
};

// ---------------------------------------------------------------------------------------------- tiles

// acc[m * R + r] += W[r] * x[m] over one unit of columns.
template <class F, int R, int M, class Accumulator>
static inline __attribute__((always_inline)) void multiply_unit(Accumulator (&acc)[M * R], const uint8_t* from,
                                                                int64 row_bytes, const typename F::Number* x,
                                                                int64 padded, const uint8_t* values) {
    using V = typename F::Vector;
    UNROLL for (int r = 0; r < R; ++r) {
        V first, second;
        F::unpack(from + r * row_bytes, values, first, second);
        UNROLL for (int m = 0; m < M; ++m) {
            const auto* numbers = x + m * padded;
            Accumulator& a = acc[m * R + r];
            if constexpr (std::is_same_v<V, f32x8>) {
                a += first * load<V>(numbers);
                a += second * load<V>(numbers + F::UNIT / 2);
            } else {
                a = dot_pairs(a, first, load<V>(numbers));
                a = dot_pairs(a, second, load<V>(numbers + F::UNIT / 2));
            }
        }
    }
}

// total[m * R + r]: R rows times M tokens, of floats.
template <class F, int R, int M>
static inline void multiply_floats(f32x8 (&total)[M * R], const Rows& rows, int64 row, const float* x, int64 padded) {
    constexpr int CHAINS = R * M < 4 ? 4 : 1;  // sums that do not wait for one another
    const uint8_t* from = rows.from + row * rows.row_bytes;
    f32x8 chains[CHAINS][M * R] = {};
    int64 u = 0;
    for (; u + CHAINS <= rows.whole; u += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; ++c)
            multiply_unit<F, R, M>(chains[c], from + (u + c) * F::BYTES, rows.row_bytes, x + (u + c) * F::UNIT, padded, nullptr);
    for (; u < rows.whole; ++u)
        multiply_unit<F, R, M>(total, from + u * F::BYTES, rows.row_bytes, x + u * F::UNIT, padded, nullptr);
    if (rows.has_tail) multiply_unit<F, R, M>(total, rows.tails[row], 64, x + u * F::UNIT, padded, nullptr);
    UNROLL for (int c = 0; c < CHAINS; ++c) UNROLL for (int i = 0; i < M * R; ++i) total[i] += chains[c][i];
}

// The same of integers: summed exactly over a step, scaled by the weight's scale, and by the activations' per stretch.
template <class F, int R, int M>
static inline void multiply_integers(f32x8 (&total)[M * R], const Rows& rows, int64 row, const Activations& x, int64 token) {
    const Weight& w = rows.w;
    const int64 step = rows.cut.step, steps = rows.cut.steps, steps_per_stretch = rows.cut.steps_per_stretch;
    const uint8_t* from = rows.from + row * rows.row_bytes;
    const int16_t* numbers = (const int16_t*)x.numbers + token * x.padded;
    const float *scales = rows.scales + row * steps, *zeros = rows.zeros + row * steps;
    for (int64 s = 0, stretch = 0; s < steps; ++stretch) {
        f32x8 part[M * R] = {};
        for (const int64 last = std::min(s + steps_per_stretch, steps); s < last; ++s) {
            i32x8 acc[M * R] = {};
            int64 u = s * step;
            const int64 end = std::min(u + step, rows.whole);
#pragma GCC unroll 2
            for (; u < end; ++u)
                multiply_unit<F, R, M>(acc, from + u * F::BYTES, rows.row_bytes, numbers + u * F::UNIT, x.padded, w.values);
            if (rows.has_tail && s == steps - 1)
                multiply_unit<F, R, M>(acc, rows.tails[row], 64, numbers + u * F::UNIT, x.padded, w.values);
            UNROLL for (int r = 0; r < R; ++r) {
                const f32x8 scale = all(scales[r * steps + s]);
                UNROLL for (int m = 0; m < M; ++m)
                    part[m * R + r] += __builtin_convertvector(acc[m * R + r], f32x8) * scale;
            }
        }
        UNROLL for (int m = 0; m < M; ++m) {
            const f32x8 scale = all(x.scales[(token + m) * x.stretches + stretch]);
            UNROLL for (int r = 0; r < R; ++r) total[m * R + r] += part[m * R + r] * scale;
        }
    }
    if (w.zeros || w.zero != 0)  // (code - zero) * x = code * x - zero * x, and the second needs only the sums of x
        for (int64 s = 0; s < steps; s += 8)
            UNROLL for (int r = 0; r < R; ++r) {
                const f32x8 zero = load<f32x8>(zeros + r * steps + s);
                UNROLL for (int m = 0; m < M; ++m)
                    total[m * R + r] -= zero * load<f32x8>(&x.sums[(token + m) * x.steps_padded + s]);
            }
}

template <class F, int R, int M>
static inline void tile(const Rows& rows, int64 row, const Activations& x, int64 token, float* out, int64 stride) {
    f32x8 total[M * R] = {};
    if constexpr (std::is_same_v<typename F::Number, float>)
        multiply_floats<F, R, M>(total, rows, row, (const float*)x.numbers + token * x.padded, x.padded);
    else
        multiply_integers<F, R, M>(total, rows, row, x, token);
    float ready[M * R];
    sums<M * R>(total, ready);
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int r = 0; r < R; ++r)
            if (row + r < rows.count) out[m * stride + r] = ready[m * R + r];
}

template <class F, int R, int M>
static void rows_by_tokens(const Rows& rows, const Activations& x, int64 token, float* out, int64 stride) {
    for (int64 row = 0; row < rows.count; row += R)
        tile<F, R, M>(rows, row, x, token, out + token * stride + row, stride);
}

// ---------------------------------------------------------------------------------------------- products

// Rows are unpacked once for all tokens where there are several; `Ready` is the format they are in then.
template <class F, class Ready>
static void rows_by_all(Rows& rows, int64 first, const Activations& x, int64 tokens, float* out, int64 stride) {
    constexpr bool FLOATS = std::is_same_v<typename F::Number, float>;
    constexpr int MANY = FLOATS ? 6 : 4;  // as many as the registers hold
    rows.take<F>(first, tokens > 1);
    // One token: long rows wait for memory and want to be a single stream, short ones for arithmetic and share the token.
    if (tokens == 1) return rows_by_tokens<F, F::BYTES < F::UNIT ? 2 : 1, 1>(rows, x, 0, out, stride);
    int64 token = 0;
    for (; token + MANY <= tokens; token += MANY) rows_by_tokens<Ready, 2, MANY>(rows, x, token, out, stride);
    switch (tokens - token) {
        case 5: return rows_by_tokens<Ready, 2, 5>(rows, x, token, out, stride);
        case 4: return rows_by_tokens<Ready, 2, 4>(rows, x, token, out, stride);
        case 3: return rows_by_tokens<Ready, 2, 3>(rows, x, token, out, stride);
        case 2: return rows_by_tokens<Ready, 2, 2>(rows, x, token, out, stride);
        case 1: return rows_by_tokens<Ready, 2, 1>(rows, x, token, out, stride);
    }
}

template <class F>
static void product(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride) {
    using Ready = std::conditional_t<std::is_same_v<typename F::Number, float>, Float32, Signed16>;
    const Cut cut(w);
#pragma omp single
    shared.reserve(w, cut, tokens);
#pragma omp for schedule(static)
    for (int64 token = 0; token < tokens; ++token) {
        if constexpr (std::is_same_v<Ready, Float32>)
            shared.arrange_floats<F>(x + token * w.columns, w.columns, token);
        else
            shared.arrange_integers<F>(w, cut, x + token * w.columns, token);
    }
    Rows rows(w, cut);
#pragma omp for schedule(static)
    for (int64 first = 0; first < w.rows; first += ROWS) {
        rows_by_all<F, Ready>(rows, first, shared, tokens, out + first, stride);
        if (w.bias)
            for (int64 token = 0; token < tokens; ++token)
                for (int64 r = first; r < std::min(first + ROWS, w.rows); ++r) out[token * stride + r] += w.bias[r];
    }
}

// out[token * stride + row] = sum over columns of x[token, column] * W[row, column], plus the bias.
// For all threads of a parallel region; complete when it returns.
static void product(const Weight& w, Activations& shared, const float* x, int64 tokens, float* out, int64 stride) {
    switch (w.kind) {
        case FLOAT32: return product<Float32>(w, shared, x, tokens, out, stride);
        case BFLOAT16: return product<BFloat16>(w, shared, x, tokens, out, stride);
        case FLOAT16: return product<Float16>(w, shared, x, tokens, out, stride);
        case SIGNED8: return product<Signed8>(w, shared, x, tokens, out, stride);
        case UNSIGNED8: return product<Unsigned8>(w, shared, x, tokens, out, stride);
        case NIBBLES: return product<Nibbles>(w, shared, x, tokens, out, stride);
        case CODEBOOK: return product<Codebook>(w, shared, x, tokens, out, stride);
    }
}

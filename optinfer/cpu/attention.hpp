// Attention over pages, for queries of many sequences packed in a row: a few of one sequence or all of its prompt.
//
// The online softmax of lesson 3, by tiles of TILE keys: scores, their exponentials against the highest so far, and a
// weighted sum of values that is corrected when a higher score turns up. The query heads that share a key head are
// attended together, so a key is read from its page, wherever that lies, once for all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.hpp"
#include "team.hpp"
#include "vectors.hpp"

const int TILE = 16;  // keys at a time
const int ROWS_PER_TILE = 32;  // query heads times queries that share a tile of keys, about

// Keys and values of one layer [blocks, block_size, kv_heads, head_dim], in any order of memory; strides in numbers.
struct Pages {
    void *keys, *values;
    float *key_scales, *value_scales;  // of 8-bit pages [blocks, block_size, kv_heads]
    int64 kind;                        // FLOAT32, BFLOAT16, FLOAT16 or SIGNED8
    int64 block_size, kv_heads, head_dim;
    int64 block_stride, token_stride, head_stride;
};

// Call `run` with a number of the type that the pages hold.
template <class Run>
static void in_type_of(const Pages& pages, Run run) {
    switch (pages.kind) {
        case FLOAT32: return run(float());
        case BFLOAT16: return run(bf16());
        case FLOAT16: return run(fp16());
        case SIGNED8: return run(int8_t());
    }
}

// Queries `first_query[i]` to `first_query[i + 1]` are the last ones of sequence i, which has `context[i]` tokens.
struct Sequences {
    int64 count, table_width, tree_width;
    const int64 *first_query, *context, *tables;  // [count + 1], [count], [count, table_width]
    const bool* tree;  // [queries, tree_width]: which of its sequence's queries each sees, of those up to itself; all: null
};

struct Scoring {
    float scale, softcap;  // softcap 0: none
    int64 window;          // 0: all tokens before; else so many, the query's own included
    const float* sinks;    // [heads] scores of a key whose value is zero; none: null
};

template <class T>
static inline void read_row(const T* __restrict from, int64 dim, float scale, float* __restrict out) {
    for (int64 i = 0; i < dim; ++i) out[i] = float(from[i]) * scale;
}

template <class T>
static inline void write_row(T* __restrict to, const float* __restrict from, int64 dim, float* scales, int64 index) {
    if (scales) {  // 8 bits: one scale per token and head
        float highest = 0;
        for (int64 i = 0; i < dim; ++i) highest = std::max(highest, std::fabs(from[i]));
        scales[index] = highest / 127;
        const float unit = highest > 0 ? 127 / highest : 0;
        for (int64 i = 0; i < dim; ++i) to[i] = T(std::nearbyint(from[i] * unit));
    } else {
        for (int64 i = 0; i < dim; ++i) to[i] = T(from[i]);
    }
}

// Where the t-th token of a sequence lies in the pages.
struct Place {
    const Pages& pages;
    const int64* table;
    int64 head;
    int64 number(int64 t) const {
        unsigned token = t, size = pages.block_size;
        return table[token / size] * pages.block_stride + token % size * pages.token_stride + head * pages.head_stride;
    }
    int64 scale(int64 t) const {
        unsigned token = t, size = pages.block_size;
        return (table[token / size] * size + token % size) * pages.kv_heads + head;
    }
};

// Keys or values of the tokens `first` to `first + count` as floats [count, width], `width` a multiple of 8.
template <class T>
static void read_tile(const Place& place, const T* pool, const float* scales, int64 first, int64 count, int64 width, float* out) {
    const int64 dim = place.pages.head_dim;
    for (int64 t = 0; t < count; ++t) {
        const T* from = pool + place.number(first + t);
        read_row(from, dim, scales ? scales[place.scale(first + t)] : 1.0f, out + t * width);
    }
}

// The state of the online softmax of some rows, and their sums of values [rows, width].
struct Softmax {
    std::vector<float> highest, total, sums;
};

// Some queries of one sequence, attended by one thread for one key head.
struct Span {
    int64 sequence, first, count;
};

static inline std::vector<Span> spans_of(const Sequences& sequences, int64 group) {
    const int64 most = std::max<int64>(1, ROWS_PER_TILE / group);
    std::vector<Span> spans;
    for (int64 i = 0; i < sequences.count; ++i)
        for (int64 first = sequences.first_query[i], last = sequences.first_query[i + 1]; first < last; first += most)
            spans.push_back({i, first, std::min(most, last - first)});
    return spans;
}

// scores[t] = q . keys[t] for a tile of keys [TILE, width].
static inline void score_row(const float* q, const float* keys, int64 width, float* scores) {
    UNROLL for (int t = 0; t < TILE; t += 4) {
        f32x8 acc[4] = {};
        for (int64 i = 0; i < width; i += 8) {
            const f32x8 query = load<f32x8>(q + i);
            UNROLL for (int j = 0; j < 4; ++j) acc[j] += query * load<f32x8>(keys + (t + j) * width + i);
        }
        sums<4>(acc, scores + t);
    }
}

// One tile's share in one row: `scores` become weights, older shares shrink if a higher score came.
static inline void add_row(Softmax& state, int row, float* scores, const float* values, int64 width) {
    float highest = state.highest[row];
    for (int t = 0; t < TILE; ++t) highest = std::max(highest, scores[t]);
    if (highest == -INFINITY) return;  // nothing to be seen yet
    const float shrink = state.highest[row] == -INFINITY ? 0 : std::exp(state.highest[row] - highest);
    f32x8 total{};
    UNROLL for (int t = 0; t < TILE; t += 8) {
        const f32x8 score = load<f32x8>(scores + t);
        f32x8 weight = exp_negative(score - highest);
        weight = score == -INFINITY ? f32x8{} : weight;
        std::memcpy(scores + t, &weight, sizeof weight);
        total += weight;
    }
    state.highest[row] = highest;
    state.total[row] = state.total[row] * shrink + sum(total);
    float* sums = &state.sums[row * width];
    for (int64 i = 0; i < width; i += 8) {
        f32x8 acc = load<f32x8>(sums + i) * shrink;
        UNROLL for (int t = 0; t < TILE; ++t) acc += load<f32x8>(values + t * width + i) * scores[t];
        std::memcpy(sums + i, &acc, sizeof acc);
    }
}

// One span for one key head and the query heads that share it. q and out: [tokens, heads, head_dim].
template <class T>
static void attend_span(const Pages& pages, const Sequences& sequences, const Scoring& scoring, const Span& span, int64 head,
                        int64 group, const float* q, int64 q_stride, float* out, int64 out_stride) {
    const Place place{pages, sequences.tables + span.sequence * sequences.table_width, head};
    const int64 dim = pages.head_dim, width = (dim + 7) / 8 * 8, rows = span.count * group;
    static thread_local std::vector<float> memory;
    static thread_local Softmax state;
    memory.assign((rows + 2 * TILE) * width, 0);
    state.sums.assign(rows * width, 0);
    state.highest.resize(rows);
    state.total.resize(rows);
    float *queries = memory.data(), *keys = queries + rows * width, *values = keys + TILE * width;
    auto at = [&](auto* tensor, int64 stride, int64 row) {  // head `row` of the span
        return tensor + (span.first + row / group) * stride + (head * group + row % group) * dim;
    };
    for (int64 row = 0; row < rows; ++row) {
        read_row(at(q, q_stride, row), dim, scoring.scale, queries + row * width);
        state.highest[row] = scoring.sinks ? scoring.sinks[head * group + row % group] : -INFINITY;
        state.total[row] = scoring.sinks ? 1 : 0;
    }
    // Position of the first query: the last one of the sequence stands at the end of its context.
    const int64 position = sequences.context[span.sequence] - (sequences.first_query[span.sequence + 1] - span.first);
    const int64 fresh = position - (span.first - sequences.first_query[span.sequence]);  // of the sequence's first query
    const int64 begin = scoring.window > 0 ? std::max<int64>(0, position + 1 - scoring.window) : 0;
    const int64 end = position + span.count;
    for (int64 first = begin; first < end; first += TILE) {
        const int64 number = std::min<int64>(TILE, end - first);
        read_tile(place, (const T*)pages.keys, pages.key_scales, first, number, width, keys);
        read_tile(place, (const T*)pages.values, pages.value_scales, first, number, width, values);
        std::fill(values + number * width, values + TILE * width, 0.0f);
        for (int64 row = 0; row < rows; ++row) {
            const int64 own = position + row / group;  // the last token that this query sees
            if (first > own) continue;
            float scores[TILE];
            score_row(queries + row * width, keys, width, scores);
            if (scoring.softcap > 0)
                for (float& score : scores) score = scoring.softcap * std::tanh(score / scoring.softcap);
            const int64 oldest = scoring.window > 0 ? own + 1 - scoring.window : 0;
            for (int64 t = 0; t < TILE; ++t)
                if (first + t < oldest || first + t > own) scores[t] = -INFINITY;
            if (sequences.tree) {
                const bool* sees = sequences.tree + (span.first + row / group) * sequences.tree_width - fresh;
                for (int64 t = std::max(fresh, first); t <= std::min(own, first + TILE - 1); ++t)
                    if (!sees[t]) scores[t - first] = -INFINITY;
            }
            add_row(state, row, scores, values, width);
        }
    }
    for (int64 row = 0; row < rows; ++row)
        read_row(&state.sums[row * width], dim, 1 / state.total[row], at(out, out_stride, row));
}

template <class T>
static void attend(const Pages& pages, const Sequences& sequences, const std::vector<Span>& spans, const Scoring& scoring,
                   int64 heads, const float* q, int64 q_stride, float* out, int64 out_stride, int threads) {
    Team::each(spans.size() * pages.kv_heads, threads, [&](int64 i) {
        const Span& span = spans[i / pages.kv_heads];
        attend_span<T>(pages, sequences, scoring, span, i % pages.kv_heads, heads / pages.kv_heads, q, q_stride, out, out_stride);
    });
}

// Copy keys and values [tokens, kv_heads, head_dim] to their slots: slot = block * block_size + place in the block.
template <class T>
static void write_pages(const Pages& pages, const float* k, const float* v, int64 stride, const int64* slots, int64 token) {
    const int64 block = slots[token] / pages.block_size, place = slots[token] % pages.block_size;
    for (int64 head = 0; head < pages.kv_heads; ++head) {
        const int64 from = token * stride + head * pages.head_dim;
        const int64 to = block * pages.block_stride + place * pages.token_stride + head * pages.head_stride;
        write_row((T*)pages.keys + to, k + from, pages.head_dim, pages.key_scales, slots[token] * pages.kv_heads + head);
        write_row((T*)pages.values + to, v + from, pages.head_dim, pages.value_scales, slots[token] * pages.kv_heads + head);
    }
}

// What Python calls (`optinfer/cpu/library.py`): structs by reference, tensors as pointers, nothing kept.

#include "decoder.hpp"

// All else is hidden: two libraries in one process, compiled for different registers, must not share each other's memory.
#pragma GCC visibility push(default)
extern "C" {

// To be compared with the sizes that Python believes in.
void sizes(int64* out) {
    const int64 all[] = {sizeof(Weight), sizeof(Pages), sizeof(Sequences), sizeof(Scoring), sizeof(Layer), sizeof(Decoder),
                         sizeof(Step)};
    std::copy(std::begin(all), std::end(all), out);
}

// out [tokens, rows] = x [tokens, columns] @ w.T + bias; rounded: the numbers may be rounded to bf16
void linear(const Weight* w, const float* x, int64 tokens, float* out, int rounded, int threads) {
    static thread_local Activations own;
    product(*w, own, x, tokens, out, w->rows, threads, rounded);
}

// Keys and values [tokens, kv_heads, head_dim] to their slots.
void write(const Pages* pages, const float* k, const float* v, int64 tokens, const int64* slots) {
    for (int64 token = 0; token < tokens; ++token)
        in_type_of(*pages, [&](auto number) {
            write_pages<decltype(number)>(*pages, k, v, pages->kv_heads * pages->head_dim, slots, token);
        });
}

// out [tokens, heads, head_dim] from q of the same shape.
void attend(const Pages* pages, const Sequences* sequences, const Scoring* scoring, int64 heads, const float* q, float* out,
            int threads) {
    const std::vector<Span> spans = spans_of(*sequences, heads / pages->kv_heads);
    const int64 stride = heads * pages->head_dim;
    in_type_of(*pages, [&](auto number) {
        attend<decltype(number)>(*pages, *sequences, spans, *scoring, heads, q, stride, out, stride, threads);
    });
}

void decode(const Decoder* model, const Step* step, int threads) { decode(*model, *step, threads); }

// out[row] = the column of the largest number of a row, the first of equals; -1 where that is infinite, or a number is NaN.
void likeliest(const float* x, int64 rows, int64 columns, int64* out, int threads) {
    using Floats = Wide::Floats;
    const int64 together = 4 * Wide::LANES;  // four maxima that do not wait for one another
    Team::each(rows, threads, [&](int64 row) {
        const float* from = x + row * columns;
        float highest = -INFINITY;
        bool is_nan = false;
        Floats best[4] = {Floats{} + highest, Floats{} + highest, Floats{} + highest, Floats{} + highest};
        Wide::Ints nans{};
        int64 i = 0;
        for (; i + together <= columns; i += together)
            UNROLL for (int j = 0; j < 4; ++j) {
                const Floats v = load<Floats>(from + i + j * Wide::LANES);
                best[j] = v > best[j] ? v : best[j];
                nans |= v != v;
            }
        for (; i < columns; ++i) highest = std::max(highest, from[i]), is_nan |= from[i] != from[i];
        for (int j = 0; j < 4 * Wide::LANES; ++j) highest = std::max(highest, best[j / Wide::LANES][j % Wide::LANES]);
        for (int j = 0; j < Wide::LANES; ++j) is_nan |= nans[j] != 0;
        out[row] = is_nan || std::isinf(highest) ? -1 : std::find(from, from + columns, highest) - from;
    });
}

// Read memory once, as a product reads its weight.
float read_all(const float* from, int64 count, int threads) {
    std::vector<float> totals(count / 65536);
    Team::each(totals.size(), threads, [&](int64 piece) {
        f32x8 acc[4] = {};
        for (int64 i = piece * 65536; i < (piece + 1) * 65536; i += 32)
            UNROLL for (int j = 0; j < 4; ++j) acc[j] += load<f32x8>(from + i + 8 * j);
        totals[piece] = sum(acc[0] + acc[1] + acc[2] + acc[3]);
    });
    float total = 0;
    for (float part : totals) total += part;
    return total;
}
}
#pragma GCC visibility pop

// What Python calls (`optinfer/cpu/library.py`): structs by reference, tensors as pointers, nothing kept.

#include "decoder.hpp"

extern "C" {

// To be compared with the sizes that Python believes in.
void sizes(int64* out) {
    const int64 all[] = {sizeof(Weight), sizeof(Pages), sizeof(Sequences), sizeof(Scoring), sizeof(Layer), sizeof(Decoder),
                         sizeof(Step)};
    std::copy(std::begin(all), std::end(all), out);
}

// out [tokens, rows] = x [tokens, columns] @ w.T + bias
void linear(const Weight* w, const float* x, int64 tokens, float* out, int threads) {
    static thread_local Activations own;
    Activations& shared = own;
#pragma omp parallel num_threads(threads)
    product(*w, shared, x, tokens, out, w->rows);
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
#pragma omp parallel num_threads(threads)
    in_type_of(*pages, [&](auto number) {
        attend<decltype(number)>(*pages, *sequences, spans, *scoring, heads, q, stride, out, stride);
    });
}

void decode(const Decoder* model, const Step* step, int threads) { decode(*model, *step, threads); }

// Read memory once, as a product reads its weight.
float read_all(const float* from, int64 count, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64 block = 0; block < count / 1024; ++block) {
        f32x8 acc[4] = {};
        for (int64 i = block * 1024; i < (block + 1) * 1024; i += 32)
            UNROLL for (int j = 0; j < 4; ++j) acc[j] += load<f32x8>(from + i + 8 * j);
        total += sum(acc[0] + acc[1] + acc[2] + acc[3]);
    }
    return total;
}
}

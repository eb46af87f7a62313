// What a decoder does between its matrix products, for a step's few tokens on a CPU.
//
// In torch each of these is several calls, and attention first copies every sequence's pages to one place. Here a
// norm, a rotation and attention over pages are one loop each: all sums in fp32, one rounding at the end.
// Plain C++17 for `cpu_kernels.py`, which compiles it for the processor at hand; `int64` as torch's shapes are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using int64 = std::int64_t;

static float as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static std::uint32_t as_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

struct bf16 {  // the upper half of a float
    std::uint16_t bits;
    bf16() = default;
    bf16(float x) {
        std::uint32_t u = as_bits(x);
        bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    }
    operator float() const { return as_float(std::uint32_t(bits) << 16); }
};

// e^x for x <= 0 as 2^i * e^r with |r| <= log(2)/2; the compiler turns it into vector instructions.
static inline float exp_negative(float x) {
    x = std::max(x, -87.0f);
    float i = std::nearbyint(x * 1.44269504f);
    float r = x - i * 0.69314718f;
    float sum = 1;
    for (int k = 7; k > 0; --k) sum = 1 + sum * r * (1.0f / k);  // Taylor, exact to fp32
    return sum * as_float(std::uint32_t(int(i) + 127) << 23);
}

// out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight
template <typename T>
static void rms_norm(T* out, const T* x, const T* weight, float eps, int64 rows, int64 width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 64)
    for (int64 row = 0; row < rows; ++row) {
        const T* in = x + row * width;
        float squares = 0;
        for (int64 i = 0; i < width; ++i) squares += float(in[i]) * float(in[i]);
        float factor = 1 / std::sqrt(squares / width + eps);
        for (int64 i = 0; i < width; ++i) out[row * width + i] = float(in[i]) * factor * float(weight[i]);
    }
}

// Rotary embedding in place: pairs (i, i + dim/2) of each head turn by their angle. Heads of a row are contiguous.
template <typename T>
static void rotate(T* x, const T* cos, const T* sin, int64 rows, int64 stride, int64 heads, int64 dim, int threads) {
    int64 half = dim / 2;
#pragma omp parallel for num_threads(threads) if (rows > 64)
    for (int64 row = 0; row < rows; ++row) {
        const T *c = cos + row * dim, *s = sin + row * dim;
        for (int64 head = 0; head < heads; ++head) {
            T *first = x + row * stride + head * dim, *second = first + half;
            for (int64 i = 0; i < half; ++i) {
                float a = first[i], b = second[i];
                first[i] = a * float(c[i]) - b * float(s[i]);
                second[i] = b * float(c[i + half]) + a * float(s[i + half]);
            }
        }
    }
}

// Pages of one layer, [blocks, kv_heads, block_size, dim], and where each row's sequence finds its own.
template <typename T>
struct Pages {
    const T *keys, *values;
    const int64 *tables, *sequence, *position;  // [sequences, width], [rows], [rows]
    int64 width, kv_heads, block_size, dim;
};

const int AHEAD = 16;  // tokens: pages lie anywhere, so the processor cannot guess which memory comes next

// The query heads of one row that share a KV head: out = softmax(scale * q k^T) v over the tokens up to its own.
// DIM: the head dimension where the compiler may know it, else 0.
template <typename T, int DIM>
static void attend_row(const Pages<T>& pages, T* __restrict out, const T* __restrict q, int64 group, int64 row,
                       int64 kv_head, float scale, int64 window, float softcap) {
    const int64 dim = DIM ? DIM : pages.dim, last = pages.position[row];
    const int64 first = window > 0 ? std::max<int64>(0, last + 1 - window) : 0, length = last + 1 - first;
    const int64* table = pages.tables + pages.sequence[row] * pages.width;
    auto head = [&](const T* pool, int64 t) {  // the key or value of the t-th token that the row sees
        unsigned token = std::min(first + t, last), size = pages.block_size;
        return pool + ((table[token / size] * pages.kv_heads + kv_head) * size + token % size) * dim;
    };
    auto prefetch = [&](const T* line) {
        for (int64 i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(line + i);
    };
    static thread_local std::vector<float> memory;
    memory.resize(group * (2 * dim + length));
    float *__restrict query = memory.data(), *__restrict sum = query + group * dim;
    float* __restrict weights = sum + group * dim;
    for (int64 i = 0; i < group * dim; ++i) query[i] = float(q[i]) * scale, sum[i] = 0;

    for (int64 t = 0; t < length; ++t) {
        const T* __restrict key = head(pages.keys, t);
        prefetch(head(pages.keys, t + AHEAD));
        for (int64 g = 0; g < group; ++g) {
            float score = 0;
            for (int64 i = 0; i < dim; ++i) score += query[g * dim + i] * float(key[i]);
            weights[g * length + t] = score;
        }
    }
    for (int64 g = 0; g < group; ++g) {
        float *__restrict w = weights + g * length, total = 0;
        if (softcap > 0)
            for (int64 t = 0; t < length; ++t) w[t] = softcap * std::tanh(w[t] / softcap);
        float highest = *std::max_element(w, w + length);
        for (int64 t = 0; t < length; ++t) total += w[t] = exp_negative(w[t] - highest);
        for (int64 t = 0; t < length; ++t) w[t] /= total;
    }
    for (int64 t = 0; t < length; ++t) {
        const T* __restrict value = head(pages.values, t);
        prefetch(head(pages.values, t + AHEAD));
        for (int64 g = 0; g < group; ++g)
            for (int64 i = 0; i < dim; ++i) sum[g * dim + i] += weights[g * length + t] * float(value[i]);
    }
    for (int64 i = 0; i < group * dim; ++i) out[i] = sum[i];
}

template <typename T>
static void attend(Pages<T> pages, T* out, const T* q, int64 stride, int64 rows, int64 heads, float scale,
                   int64 window, float softcap, int threads) {
    int64 dim = pages.dim, group = heads / pages.kv_heads;
    auto one = dim == 64 ? attend_row<T, 64> : dim == 128 ? attend_row<T, 128> : attend_row<T, 0>;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64 row = 0; row < rows; ++row)
        for (int64 kv_head = 0; kv_head < pages.kv_heads; ++kv_head) {
            int64 head = kv_head * group * dim;
            one(pages, out + row * heads * dim + head, q + row * stride + head, group, row, kv_head, scale, window,
                softcap);
        }
}

// Copy each row's heads to their places in the pages: `places` [rows, kv_heads] counts slots of one head.
template <typename T>
static void write(T* pages, const T* x, const int64* places, int64 rows, int64 stride, int64 kv_heads, int64 dim) {
    for (int64 row = 0; row < rows; ++row)
        for (int64 head = 0; head < kv_heads; ++head)
            std::copy_n(x + row * stride + head * dim, dim, pages + places[row * kv_heads + head] * dim);
}

#define EXPORT(T)                                                                                                     \
    extern "C" void rms_norm_##T(T* out, const T* x, const T* weight, float eps, int64 rows, int64 width,             \
                                 int threads) {                                                                       \
        rms_norm(out, x, weight, eps, rows, width, threads);                                                          \
    }                                                                                                                 \
    extern "C" void rotate_##T(T* x, const T* cos, const T* sin, int64 rows, int64 stride, int64 heads, int64 dim,    \
                               int threads) {                                                                         \
        rotate(x, cos, sin, rows, stride, heads, dim, threads);                                                       \
    }                                                                                                                 \
    extern "C" void write_##T(T* pages, const T* x, const int64* places, int64 rows, int64 stride, int64 kv_heads,    \
                              int64 dim) {                                                                            \
        write(pages, x, places, rows, stride, kv_heads, dim);                                                         \
    }                                                                                                                 \
    extern "C" void attend_##T(T* out, const T* q, const T* keys, const T* values, const int64* tables,               \
                               const int64* sequence, const int64* position, int64 rows, int64 stride, int64 heads,   \
                               int64 kv_heads, int64 dim, int64 block_size, int64 width, float scale, int64 window,   \
                               float softcap, int threads) {                                                          \
        attend<T>({keys, values, tables, sequence, position, width, kv_heads, block_size, dim}, out, q, stride, rows, \
                  heads, scale, window, softcap, threads);                                                            \
    }

EXPORT(bf16)
EXPORT(float)

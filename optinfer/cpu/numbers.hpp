// Floating-point numbers of 32 or 16 bits, as tensors hold them.
#pragma once

#include <cstdint>
#include <cstring>

static inline float as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline std::uint32_t as_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

struct bf16 {  // the upper half of a float
    std::uint16_t bits;
    bf16() = default;
    bf16(float x) {
        std::uint32_t u = as_bits(x);
        bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest, ties to even
    }
    operator float() const { return as_float(std::uint32_t(bits) << 16); }
};

struct fp16 {  // 1 sign bit, 5 exponent bits (bias 15), 10 mantissa bits
    std::uint16_t bits;
    fp16() = default;
    fp16(float x) {
        std::uint32_t u = as_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
        if (magnitude > 0x7f800000) bits = sign | 0x7e00;
        else if (magnitude >= 0x477ff000) bits = sign | 0x7c00;                     // 65520 and more: infinity
        else if (magnitude < 0x38800000)                                            // below 2^-14: multiples of 2^-24
            bits = sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
        else bits = sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
    }
    operator float() const {
        std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, magnitude = std::uint32_t(bits & 0x7fff) << 13;
        if (magnitude >= 0x0f800000) return as_float(sign | magnitude | 0x7f800000);  // infinity, not a number
        return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));
    }
};

// What memory holds: numbers, or codes that a scale turns into numbers.
enum Kind : std::int64_t { FLOAT32, BFLOAT16, FLOAT16, SIGNED8, UNSIGNED8, NIBBLES, CODEBOOK };

// A tensor of numbers whose type is known when it is read.
class Numbers {
  public:
    const void* data;
    std::int64_t kind;  // FLOAT32, BFLOAT16 or FLOAT16

    explicit operator bool() const { return data; }
    float operator[](std::int64_t i) const {
        if (kind == FLOAT32) return ((const float*)data)[i];
        return kind == BFLOAT16 ? float(((const bf16*)data)[i]) : float(((const fp16*)data)[i]);
    }
    void read(std::int64_t first, std::int64_t count, float* out) const {
        if (kind == FLOAT32) return read_as<float>(first, count, out);
        return kind == BFLOAT16 ? read_as<bf16>(first, count, out) : read_as<fp16>(first, count, out);
    }

  private:
    template <class T>
    void read_as(std::int64_t first, std::int64_t count, float* __restrict out) const {
        const T* from = (const T*)data + first;
        for (std::int64_t i = 0; i < count; ++i) out[i] = from[i];
    }
};

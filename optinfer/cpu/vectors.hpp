// Vectors of 32 bytes, and the few operations on them that C++ has no words for.
//
// GCC's and Clang's vector types become AVX2, AVX-512 or NEON instructions, whatever the processor has. Where one
// instruction does what the compiler would not find by itself, it is named here, with a plain loop beside it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using int64 = std::int64_t;
using std::int16_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

typedef float f32x8 __attribute__((vector_size(32)));
typedef std::int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

template <class V>
static inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// The same vector, in a register: otherwise compilers load it anew for every instruction that takes it.
template <class V>
static INLINE V in_register(V v) {
#if defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

template <class V>
static inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

static inline f32x8 all(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

// 16 bytes as 16-bit integers.
static inline i16x16 widen(i8x16 v) {
#if defined(__AVX2__)
    return (i16x16)_mm256_cvtepi8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, i16x16);
#endif
}

static inline i16x16 widen(u8x16 v) {
#if defined(__AVX2__)
    return (i16x16)_mm256_cvtepu8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, i16x16);
#endif
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1]
static inline i32x8 dot_pairs(i32x8 acc, i16x16 a, i16x16 b) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return (i32x8)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return acc + (i32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < 8; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return acc;
#endif
}

static inline void as_floats(i16x16 v, f32x8& first, f32x8& second) {
#if defined(__AVX2__)
    first = (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)v)));
    second = (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)v, 1)));
#else
    for (int i = 0; i < 8; ++i) first[i] = v[i], second[i] = v[8 + i];
#endif
}

static inline float sum(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// out[i] = the sum of v[i]. Four at a time they share the additions.
template <int N>
static INLINE void sums(const f32x8* v, float* out) {
#if defined(__AVX2__)
    UNROLL for (int i = 0; i < N; i += 4) {
        const f32x8 zero{};
        __m256 a = _mm256_hadd_ps((__m256)v[i], (__m256)(i + 1 < N ? v[i + 1] : zero));
        __m256 b = i + 2 < N ? _mm256_hadd_ps((__m256)v[i + 2], (__m256)(i + 3 < N ? v[i + 3] : zero)) : (__m256)zero;
        a = _mm256_hadd_ps(a, b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        float ready[4];
        _mm_storeu_ps(ready, four);
        for (int j = 0; j < 4 && i + j < N; ++j) out[i + j] = ready[j];
    }
#else
    for (int i = 0; i < N; ++i) out[i] = sum(v[i]);
#endif
}

// e^x for x <= 0 as 2^i * e^r with |r| <= log(2)/2.
static inline f32x8 exp_negative(f32x8 x) {
    x = x < -87.0f ? all(-87.0f) : x;
    f32x8 shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, in the lowest bits
    i32x8 power = (i32x8)shifted - (i32x8)all(12582912.0f);
    f32x8 r = x - (shifted - 12582912.0f) * 0.693147182f;
    f32x8 sum = all(1);
    UNROLL for (int k = 7; k > 0; --k) sum = sum * r * (1.0f / k) + 1;  // Taylor, exact to fp32
    return sum * (f32x8)((power + 127) << 23);
}

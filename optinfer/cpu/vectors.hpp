// Vectors as wide as the processor's registers, and the few operations on them that C++ has no words for.
//
// GCC's and Clang's vector types become AVX2, AVX-512 or NEON instructions, whatever the processor has. Where one
// instruction does what the compiler would not find by itself, it is named here, with a plain loop beside it.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using int64 = std::int64_t;
using std::int16_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

// What a register of so many bytes holds. Bytes are half a register: they become shorts.
template <int BYTES>
struct Registers {
    static constexpr int WIDTH = BYTES, LANES = BYTES / 4;
    typedef float Floats __attribute__((vector_size(BYTES)));
    typedef std::int32_t Ints __attribute__((vector_size(BYTES)));
    typedef uint32_t Words __attribute__((vector_size(BYTES)));
    typedef int16_t Shorts __attribute__((vector_size(BYTES)));
    typedef int8_t SignedBytes __attribute__((vector_size(BYTES / 2)));
    typedef uint8_t Bytes __attribute__((vector_size(BYTES / 2)));
};

using Narrow = Registers<32>;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define WIDE 1
using Wide = Registers<64>;
#else
using Wide = Narrow;
#endif

// One instruction multiplies shorts and adds them to a sum.
#if (defined(__AVX512VNNI__) && defined(WIDE)) || defined(__AVXVNNI__)
#define VNNI 1
#endif

using f32x8 = Narrow::Floats;
using i32x8 = Narrow::Ints;

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
#if defined(WIDE)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

template <class V>
static inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Two vectors of numbers, one after the other.
template <class Floats>
static INLINE void store_pair(float* to, Floats first, Floats second) {
    store(to, first);
    store(to + sizeof(Floats) / sizeof(float), second);
}

static inline f32x8 all(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

// Bytes as 16-bit integers.
static inline Narrow::Shorts widen(Narrow::SignedBytes v) {
#if defined(__AVX2__)
    return (Narrow::Shorts)_mm256_cvtepi8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, Narrow::Shorts);
#endif
}

static inline Narrow::Shorts widen(Narrow::Bytes v) {
#if defined(__AVX2__)
    return (Narrow::Shorts)_mm256_cvtepu8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, Narrow::Shorts);
#endif
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1]
static inline Narrow::Ints dot_pairs(Narrow::Ints acc, Narrow::Shorts a, Narrow::Shorts b) {
#if defined(VNNI)
    return (Narrow::Ints)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return acc + (Narrow::Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < 8; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return acc;
#endif
}

static inline void as_floats(Narrow::Shorts v, f32x8& first, f32x8& second) {
#if defined(__AVX2__)
    first = (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)v)));
    second = (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)v, 1)));
#else
    for (int i = 0; i < 8; ++i) first[i] = v[i], second[i] = v[8 + i];
#endif
}

static inline f32x8 halves_added(f32x8 v) { return v; }

#if defined(WIDE)
static inline Wide::Shorts widen(Wide::SignedBytes v) { return (Wide::Shorts)_mm512_cvtepi8_epi16((__m256i)v); }
static inline Wide::Shorts widen(Wide::Bytes v) { return (Wide::Shorts)_mm512_cvtepu8_epi16((__m256i)v); }

static inline Wide::Ints dot_pairs(Wide::Ints acc, Wide::Shorts a, Wide::Shorts b) {
#if defined(VNNI)
    return (Wide::Ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    return acc + (Wide::Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

// The same of bf16: one instruction for twice as many products as a multiply-add of floats has.
#if defined(__AVX512BF16__)
#define BF16_PAIRS 1
static inline Wide::Floats dot_pairs(Wide::Floats acc, Wide::Shorts a, Wide::Shorts b) {
    return (Wide::Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

static INLINE void store_pair(bf16* to, Wide::Floats first, Wide::Floats second) {
    store(to, (Wide::Shorts)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
static INLINE void store_pair(bf16* to, f32x8 first, f32x8 second) {
    store(to, (Narrow::Shorts)_mm256_cvtne2ps_pbh((__m256)second, (__m256)first));
}
#endif

static inline void as_floats(Wide::Shorts v, Wide::Floats& first, Wide::Floats& second) {
    first = (Wide::Floats)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256((__m512i)v)));
    second = (Wide::Floats)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64((__m512i)v, 1)));
}

static inline f32x8 halves_added(Wide::Floats v) {
    return (f32x8)_mm512_castps512_ps256((__m512)v) + (f32x8)_mm512_extractf32x8_ps((__m512)v, 1);
}
#endif

static inline float sum(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// out[i] = the sum of v[i]. Four at a time they share the additions.
template <int N, class Floats>
static INLINE void sums(const Floats* whole, float* out) {
    f32x8 v[N];
    UNROLL for (int i = 0; i < N; ++i) v[i] = halves_added(whole[i]);
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

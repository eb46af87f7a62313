// How each format keeps the columns of a row, and how a few of them become two vectors of numbers.
//
// Nothing is laid out anew: rows are read where the model keeps them, in the bytes in which it saves them. A load brings
// `UNIT` columns in an order that suits the instructions (for nibbles, the even columns before the odd ones); the
// activations, which are few, are put into that order instead of the weights, which are many. `place(i)` is the column,
// within the unit, of the i-th number that comes out.
#pragma once

#include "numbers.hpp"
#include "vectors.hpp"

// ---------------------------------------------------------------------------------------------- 16 and 32 bits

struct Float {  // what floats have in common
    using Number = float;
    using Vector = f32x8;
    static constexpr int UNIT = 16;
};

struct Float32 : Float {
    static constexpr int BYTES = 64;
    static constexpr int place(int i) { return i; }
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = in_register(load<f32x8>(from));
        second = in_register(load<f32x8>(from + 32));
    }
};

// 16 numbers in 8 words: shifted up they are the even columns, with the lower half cut off the odd ones.
struct BFloat16 : Float {
    static constexpr int BYTES = 32;
    static constexpr int place(int i) { return i < 8 ? 2 * i : 2 * (i - 8) + 1; }
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        u32x8 words = load<u32x8>(from);
        first = (f32x8)(words << 16);
        second = (f32x8)(words & 0xffff0000u);
    }
};

struct Float16 : Float {
    static constexpr int BYTES = 32;
    static constexpr int place(int i) { return i; }
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
#if defined(__F16C__)
        first = (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
        second = (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + 1));
#else
        for (int i = 0; i < 8; ++i) first[i] = load<fp16>(from + 2 * i), second[i] = load<fp16>(from + 16 + 2 * i);
#endif
    }
};

// ---------------------------------------------------------------------------------------------- 8 and 4 bits
// Codes become 16-bit integers, and so do the activations: one instruction multiplies 16 pairs and adds neighbours.

struct Integer {
    using Number = int16_t;
    using Vector = i16x16;
    static constexpr int UNIT = 32;
};

struct Signed8 : Integer {
    static constexpr int BYTES = 32;
    static constexpr int place(int i) { return i; }
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = widen(load<i8x16>(from));
        second = widen(load<i8x16>(from + 16));
    }
};

struct Unsigned8 : Signed8 {
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = widen(load<u8x16>(from));
        second = widen(load<u8x16>(from + 16));
    }
};

struct Nibbles : Integer {  // an even column in the high half of each byte, an odd one in the low half
    static constexpr int BYTES = 16;
    static constexpr int place(int i) { return i < 16 ? 2 * i : 2 * (i - 16) + 1; }
    static void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        i16x16 octets = widen(load<u8x16>(from));
        first = octets >> 4;
        second = octets & 15;
    }
};

// Nibbles that number 16 values. `values` holds them as 16-bit integers, first their 16 low bytes, then their high ones:
// `pshufb` looks up 32 bytes at once, and low and high bytes are joined by unpacking.
struct Codebook : Integer {
    static constexpr int BYTES = 16;
#if defined(__AVX2__)
    // The lower half of the register works on low nibbles, odd columns, the upper one on high nibbles.
    static constexpr int place(int i) { return 2 * (8 * (i / 16) + i % 8) + (i % 16 < 8 ? 1 : 0); }
    static void unpack(const uint8_t* from, const uint8_t* values, Vector& first, Vector& second) {
        __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
        __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(values + 16)));
        __m256i octets = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
        __m256i nibbles = _mm256_srlv_epi32(octets, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        __m256i codes = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(low_bytes, codes), high = _mm256_shuffle_epi8(high_bytes, codes);
        first = (i16x16)_mm256_unpacklo_epi8(low, high);
        second = (i16x16)_mm256_unpackhi_epi8(low, high);
    }
#else
    static constexpr int place(int i) { return Nibbles::place(i); }
    static void unpack(const uint8_t* from, const uint8_t* values, Vector& first, Vector& second) {
        Nibbles::unpack(from, values, first, second);
        for (int i = 0; i < 16; ++i) {
            first[i] = int16_t(values[first[i]] | values[16 + first[i]] << 8);
            second[i] = int16_t(values[second[i]] | values[16 + second[i]] << 8);
        }
    }
#endif
};

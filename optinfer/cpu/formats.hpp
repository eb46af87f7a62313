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

template <class Width>
struct Float {  // what floats have in common
    using Registers = Width;
    using Number = float;
    using Vector = typename Width::Floats;
    static constexpr int UNIT = 2 * Width::LANES;
};

template <class Width>
struct Float32 : Float<Width> {
    using typename Float<Width>::Vector;
    static constexpr int BYTES = 2 * Width::WIDTH;
    static constexpr int place(int i) { return i; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = in_register(load<Vector>(from));
        second = in_register(load<Vector>(from + Width::WIDTH));
    }
};

// Two numbers in each word: shifted up they are the even columns, with the lower half cut off the odd ones.
template <class Width>
struct BFloat16 : Float<Width> {
    using typename Float<Width>::Vector;
    static constexpr int BYTES = Width::WIDTH;
    static constexpr int place(int i) { return i < Width::LANES ? 2 * i : 2 * (i - Width::LANES) + 1; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        const auto words = load<typename Width::Words>(from);
        first = (Vector)(words << 16);
        second = (Vector)(words & 0xffff0000u);
    }
};

#if defined(BF16_PAIRS)
// Weights as they are, for processors that multiply pairs of bf16, where activations may be rounded to bf16 as well.
struct BFloat16Pairs {
    using Registers = Wide;
    using Number = bf16;
    using Vector = Wide::Shorts;
    static constexpr int UNIT = 4 * Wide::LANES, BYTES = 2 * Wide::WIDTH;
    static constexpr int place(int i) { return i; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = in_register(load<Vector>(from));
        second = in_register(load<Vector>(from + Wide::WIDTH));
    }
};
#endif

template <class Width>
struct Float16 : Float<Width> {
    using typename Float<Width>::Vector;
    static constexpr int BYTES = Width::WIDTH;
    static constexpr int place(int i) { return i; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = as_floats(from, Width());
        second = as_floats(from + BYTES / 2, Width());
    }

  private:
    static INLINE Vector as_floats(const uint8_t* from, Registers<32>) {
#if defined(__F16C__)
        return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
        Vector v;
        for (int i = 0; i < 8; ++i) v[i] = load<fp16>(from + 2 * i);
        return v;
#endif
    }
#if defined(WIDE)
    static INLINE Vector as_floats(const uint8_t* from, Registers<64>) {
        return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    }
#endif
};

// ---------------------------------------------------------------------------------------------- 8 and 4 bits
// Codes become 16-bit integers, and so do the activations: one instruction multiplies all pairs and adds neighbours.

template <class Width>
struct Integer {
    using Registers = Width;
    using Number = int16_t;
    using Vector = typename Width::Shorts;
    static constexpr int UNIT = 4 * Width::LANES;
};

template <class Width, class Bytes>
struct Code8 : Integer<Width> {
    using typename Integer<Width>::Vector;
    static constexpr int BYTES = Width::WIDTH;
    static constexpr int place(int i) { return i; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        first = widen(load<Bytes>(from));
        second = widen(load<Bytes>(from + BYTES / 2));
    }
};

template <class Width>
using Signed8 = Code8<Width, typename Width::SignedBytes>;
template <class Width>
using Unsigned8 = Code8<Width, typename Width::Bytes>;

template <class Width>
struct Nibbles : Integer<Width> {  // an even column in the high half of each byte, an odd one in the low half
    using typename Integer<Width>::Vector;
    static constexpr int BYTES = Width::WIDTH / 2, HALF = Width::WIDTH / 2;
    static constexpr int place(int i) { return i < HALF ? 2 * i : 2 * (i - HALF) + 1; }
    static INLINE void unpack(const uint8_t* from, const uint8_t*, Vector& first, Vector& second) {
        const Vector octets = widen(load<typename Width::Bytes>(from));
        first = octets >> 4;
        second = octets & 15;
    }
#if defined(WIDE)
    static INLINE Wide::Floats sixteen(const uint8_t*) {  // what each code stands for, before it is scaled
        return Wide::Floats{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    }
#endif
};

// Nibbles that number 16 values. `values` holds them as 16-bit integers, first their 16 low bytes, then their high ones.
template <class Width>
struct Codebook : Nibbles<Width> {
    using typename Integer<Width>::Vector;
    static INLINE void unpack(const uint8_t* from, const uint8_t* values, Vector& first, Vector& second) {
        Nibbles<Width>::unpack(from, values, first, second);
#if defined(WIDE)  // one instruction looks up 32 values
        const __m512i table = _mm512_broadcast_i64x4(integers(values));
        first = (Vector)_mm512_permutexvar_epi16((__m512i)first, table);
        second = (Vector)_mm512_permutexvar_epi16((__m512i)second, table);
#else
        for (int i = 0; i < Width::WIDTH / 2; ++i) {
            first[i] = int16_t(values[first[i]] | values[16 + first[i]] << 8);
            second[i] = int16_t(values[second[i]] | values[16 + second[i]] << 8);
        }
#endif
    }
#if defined(WIDE)
    static INLINE Wide::Floats sixteen(const uint8_t* values) {
        return (Wide::Floats)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(integers(values)));
    }

  private:
    static INLINE __m256i integers(const uint8_t* values) {
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)values));
        const __m256i high = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(values + 16)));
        return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
    }
#endif
};

#if defined(__AVX2__)
// `pshufb` looks up 32 bytes at once; low and high bytes are joined by unpacking.
template <>
struct Codebook<Narrow> : Integer<Narrow> {
    static constexpr int BYTES = 16;
    // The lower half of the register works on low nibbles, odd columns, the upper one on high nibbles.
    static constexpr int place(int i) { return 2 * (8 * (i / 16) + i % 8) + (i % 16 < 8 ? 1 : 0); }
    static INLINE void unpack(const uint8_t* from, const uint8_t* values, Vector& first, Vector& second) {
        __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
        __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(values + 16)));
        __m256i octets = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
        __m256i nibbles = _mm256_srlv_epi32(octets, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        __m256i codes = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(low_bytes, codes), high = _mm256_shuffle_epi8(high_bytes, codes);
        first = (Vector)_mm256_unpacklo_epi8(low, high);
        second = (Vector)_mm256_unpackhi_epi8(low, high);
    }
};
#endif

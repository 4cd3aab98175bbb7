// One step of a decoder on a CPU: embedding, all layers, final norm; and the output head. docs/cpu-step.md walks through it.
//
// Compiled once per instruction set (see build.py): the registers in part 1 are the only code that differs. A row of the
// batch is computed by the same operations in the same order whatever stands beside it, so results never depend on the
// batch. Needs -ffp-contract=off: a compiler that fuses products and sums as it likes would break that.
//
// Shapes, row-major:
//   N tokens of the step     M rows of a product (N, or the tokens whose final state is needed)
//   h hidden size            I intermediate size      V vocabulary
//   H query heads            K key/value heads        G = H / K query heads that share one      D head size
//   out x in: a matrix. Output channels are padded to whole blocks of 16, inputs to whole groups of 32, with zeros.

// Every header is parsed at the first start of an engine: std::thread and std::vector alone would take a quarter of a second.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <sched.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define USE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define USE_AVX2 1
#endif
#if defined(USE_AVX512) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define USE_AMX 1  // tests define it themselves, with an emulation of the tiles
#endif
#if defined(USE_AVX512) || defined(USE_AVX2)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;        // floats in `Floats`
constexpr int CHANNELS = LANES;  // output channels in a packed block
constexpr int QUAD = 4;          // neighbouring inputs that one integer instruction multiplies and adds
constexpr int PAIR = 2;          // the same for bfloat16
constexpr int GROUP = 32;        // inputs that share a scale in the integer formats
#ifdef USE_AMX
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif
constexpr int TILE_ROWS = HAS_TILES ? 16 : 8;  // rows of activations that lie side by side
constexpr float LOWEST = -INFINITY;

// ------------------------------------------------------------------ 1. registers
//
// Floats and Ints are 16 values, one for each channel of a block. The weights of a block that one product takes:
//   Bytes  16 channels x 4 inputs, int8 or one nibble in each byte      Pairs  16 channels x 2 inputs, bfloat16
// `load_signed`, `start_signed` and `add_signed` belong together (int8 weights), so do those of nibbles (weights 0..15), and
// of pairs. Activations are int8 (-127..127), and for pairs `PairInput`, rounded to bfloat16 whatever the type.
// MAX_ROWS: how many rows of a tile the registers hold.

#if defined(USE_AVX512)

struct Floats { __m512 v; };
struct Ints { __m512i v; };
using NibbleSums = Ints;
struct Bytes { __m512i v; };
struct Pairs { __m512i v; };
constexpr int MAX_ROWS = 8;

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats nearest_whole(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

/// 2 to the power of a, which must hold whole numbers of [-126, 127].
inline Floats power_of_two(Floats a) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), a.v)}; }

inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline __m512i widen(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load_bfloat16(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(widen(p), 16))}; }
inline Floats load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

/// The nearest bfloat16, ties to even, in the upper halves; what remains below is to be dropped.
inline __m512i round_to_upper(Floats x) {
    __m512i bits = _mm512_castps_si512(x.v), is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc00000));
}

inline void store_bfloat16(uint16_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_upper(x), 16)));
}

/// 16 floats of [-127, 127] as the nearest int8.
inline void store_int8(int8_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

inline __m512i broadcast_quad(const void* x) {
    int32_t quad;
    std::memcpy(&quad, x, QUAD);
    return _mm512_set1_epi32(quad);
}

inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints spread(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints shift_right(Ints a, int n) { return {_mm512_srli_epi32(a.v, n)}; }  // zeros come in
inline Ints bits_of(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline Floats floats_of(Ints bits) { return {_mm512_castsi512_ps(bits.v)}; }
inline Floats at_least(Floats a, Floats b) {  // 1 where a >= b, else 0
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), _mm512_set1_ps(1.0f))};
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }

/// vpdpbusd multiplies unsigned by signed bytes. So w becomes w + 128 (its sign bit turned over), and the sum starts at -128
/// times the sum of x, which the activations know.
inline Bytes load_signed(const uint8_t* p) { return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))}; }
inline Ints start_signed(const int32_t* minus_128_sum) { return {_mm512_set1_epi32(*minus_128_sum)}; }
inline Ints add_signed(Ints sums, Bytes w, const int8_t* x) { return {_mm512_dpbusd_epi32(sums.v, w.v, broadcast_quad(x))}; }

inline NibbleSums start_nibbles() { return {_mm512_setzero_si512()}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline NibbleSums add_nibbles(NibbleSums sums, Bytes w, const int8_t* x) { return add_signed(sums, w, x); }

inline Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }

#ifdef __AVX512BF16__
#ifdef USE_AMX
const char* instruction_set() { return "amx"; }
#else
const char* instruction_set() { return "avx512-bf16"; }
#endif
using PairInput = uint16_t;
inline void store_pairs(PairInput* p, Floats x) { store_bfloat16(p, x); }
inline Floats add_pair(Floats sums, Pairs w, const PairInput* x) {
    return {_mm512_dpbf16_ps(sums.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(broadcast_quad(x)))};
}
#else
const char* instruction_set() { return "avx512"; }
using PairInput = float;
inline __m512i upper_halves(__m512i a) { return _mm512_and_si512(a, _mm512_set1_epi32(-65536)); }
inline void store_pairs(PairInput* p, Floats x) { _mm512_storeu_si512(p, upper_halves(round_to_upper(x))); }
inline Floats add_pair(Floats sums, Pairs w, const PairInput* x) {
    Floats first{_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16))}, second{_mm512_castsi512_ps(upper_halves(w.v))};
    return fma(second, broadcast(x[1]), fma(first, broadcast(x[0]), sums));
}
#endif

inline void pause_briefly() { _mm_pause(); }

#elif defined(USE_AVX2)

struct Floats { __m256 low, high; };  // 8 channels each
struct Ints { __m256i low, high; };
struct NibbleSums { __m256i low, high; };  // int16, two for each channel
struct Bytes { __m256i low, high; };
struct Pairs { __m256i low, high; };
using PairInput = float;
constexpr int MAX_ROWS = 4;

const char* instruction_set() { return "avx2"; }

inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline Floats fma(Floats a, Floats b, Floats c) {  // a * b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Floats absolute(Floats a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

inline __m256 nearest_whole(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats nearest_whole(Floats a) { return {nearest_whole(a.low), nearest_whole(a.high)}; }

inline __m256 power_of_two(__m256 a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)), 23));
}

/// 2 to the power of a, which must hold whole numbers of [-126, 127].
inline Floats power_of_two(Floats a) { return {power_of_two(a.low), power_of_two(a.high)}; }

inline float sum(Floats a) {
    __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Floats a) {
    __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m128i load_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256 widen(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16)); }
inline Floats load_bfloat16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
inline Floats load_half(const uint16_t* p) { return {_mm256_cvtph_ps(load_halves(p)), _mm256_cvtph_ps(load_halves(p + 8))}; }

/// The nearest bfloat16, ties to even, in the upper halves; the lower ones are zero.
inline __m256i round_to_upper(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_and_si256(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), _mm256_set1_epi32(-65536));
}

inline void store_bfloat16(uint16_t* p, Floats x) {
    __m256i low = _mm256_srli_epi32(round_to_upper(x.low), 16), high = _mm256_srli_epi32(round_to_upper(x.high), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}

inline __m128i to_words(__m256 x) {
    __m256i wide = _mm256_cvtps_epi32(x);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

/// 16 floats of [-127, 127] as the nearest int8.
inline void store_int8(int8_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(to_words(x.low), to_words(x.high)));
}

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Ints load_ints(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
inline Ints spread(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Ints shift_right(Ints a, int n) { return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)}; }  // zeros come in
inline Ints bits_of(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline Floats floats_of(Ints bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
inline Floats at_least(Floats a, Floats b) {  // 1 where a >= b, else 0
    __m256 one = _mm256_set1_ps(1.0f);
    return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), one), _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ), one)};
}

inline Bytes load_bytes(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }

inline __m256i broadcast_quad(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, QUAD);
    return _mm256_set1_epi32(quad);
}

/// vpmaddubsw wants one side unsigned, so the sign of w moves to x; two products fit into its int16: at most 2 * 128 * 127.
inline __m256i add_signed(__m256i sums, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline Bytes load_signed(const uint8_t* p) { return load_bytes(p); }
inline Ints start_signed(const int32_t*) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints add_signed(Ints sums, Bytes w, const int8_t* x) {
    return {add_signed(sums.low, w.low, broadcast_quad(x)), add_signed(sums.high, w.high, broadcast_quad(x))};
}

inline NibbleSums start_nibbles() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i low_nibbles(__m256i a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline Bytes low_nibbles(Bytes a) { return {low_nibbles(a.low), low_nibbles(a.high)}; }
inline Bytes high_nibbles(Bytes a) { return {low_nibbles(_mm256_srli_epi16(a.low, 4)), low_nibbles(_mm256_srli_epi16(a.high, 4))}; }

/// Eight of these fit into int16, one group: 8 * 2 * 15 * 127 = 30,480.
inline NibbleSums add_nibbles(NibbleSums sums, Bytes w, const int8_t* x) {
    return {_mm256_add_epi16(sums.low, _mm256_maddubs_epi16(w.low, broadcast_quad(x))),
            _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(w.high, broadcast_quad(x)))};
}

inline Floats to_floats(NibbleSums a) {
    __m256i ones = _mm256_set1_epi16(1);
    return to_floats(Ints{_mm256_madd_epi16(a.low, ones), _mm256_madd_epi16(a.high, ones)});
}

inline Pairs load_pairs(const uint16_t* p) { return {load_256(p), load_256(p + 16)}; }
inline void store_pairs(PairInput* p, Floats x) {
    store(p, {_mm256_castsi256_ps(round_to_upper(x.low)), _mm256_castsi256_ps(round_to_upper(x.high))});
}

inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536))); }
inline Floats add_pair(Floats sums, Pairs w, const PairInput* x) {
    Floats first{first_of(w.low), first_of(w.high)}, second{second_of(w.low), second_of(w.high)};
    return fma(second, broadcast(x[1]), fma(first, broadcast(x[0]), sums));
}

inline void pause_briefly() { _mm_pause(); }

#else

struct Floats { float v[LANES]; };
struct Ints { int32_t v[LANES]; };
struct NibbleSums { int32_t v[LANES]; };
struct Bytes { uint8_t v[LANES * QUAD]; };
struct Pairs { const uint16_t* v; };
using PairInput = uint16_t;
constexpr int MAX_ROWS = 4;

const char* instruction_set() { return "portable"; }

template <typename Operation>
inline Floats each(Operation operation) {
    Floats result;
    for (int i = 0; i < LANES; i++) result.v[i] = operation(i);
    return result;
}

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    float magnitude = exponent == 0    ? fraction * 0x1p-24f
                      : exponent == 31 ? bits_to_float(0x7f800000 | fraction << 13)
                                       : bits_to_float((exponent + 112) << 23 | fraction << 13);
    return sign ? -magnitude : magnitude;
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

inline float from_bfloat16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

inline Floats broadcast(float x) { return each([&](int) { return x; }); }
inline Floats load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::copy_n(x.v, LANES, p); }
inline Floats operator+(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats operator-(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats operator*(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats operator/(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Floats larger(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats smaller(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats absolute(Floats a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
inline Floats nearest_whole(Floats a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline Floats power_of_two(Floats a) { return each([&](int i) { return bits_to_float(uint32_t(int(a.v[i]) + 127) << 23); }); }

inline float sum(Floats a) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}

inline float largest(Floats a) { return *std::max_element(a.v, a.v + LANES); }
inline Floats load_bfloat16(const uint16_t* p) { return each([&](int i) { return from_bfloat16(p[i]); }); }
inline Floats load_half(const uint16_t* p) { return each([&](int i) { return half_to_float(p[i]); }); }
inline void store_bfloat16(uint16_t* p, Floats x) { std::transform(x.v, x.v + LANES, p, to_bfloat16); }

inline void store_int8(int8_t* p, Floats x) {
    for (int i = 0; i < LANES; i++) p[i] = int8_t(std::nearbyint(x.v[i]));
}

inline Floats to_floats(const Ints& a) { return each([&](int i) { return float(a.v[i]); }); }

template <typename Value>
Ints each_int(Value value) {
    Ints result;
    for (int i = 0; i < LANES; i++) result.v[i] = int32_t(uint32_t(value(i)));
    return result;
}

inline Ints load_ints(const int32_t* p) { return each_int([&](int i) { return p[i]; }); }
inline Ints spread(int32_t x) { return each_int([&](int) { return x; }); }
inline Ints operator+(const Ints& a, const Ints& b) { return each_int([&](int i) { return uint32_t(a.v[i]) + uint32_t(b.v[i]); }); }
inline Ints operator*(const Ints& a, const Ints& b) { return each_int([&](int i) { return uint32_t(a.v[i]) * uint32_t(b.v[i]); }); }
inline Ints operator^(const Ints& a, const Ints& b) { return each_int([&](int i) { return a.v[i] ^ b.v[i]; }); }
inline Ints operator&(const Ints& a, const Ints& b) { return each_int([&](int i) { return a.v[i] & b.v[i]; }); }
inline Ints shift_right(const Ints& a, int n) { return each_int([&](int i) { return uint32_t(a.v[i]) >> n; }); }  // zeros come in
inline Floats floats_of(const Ints& bits) { return each([&](int i) { return bits_to_float(uint32_t(bits.v[i])); }); }
inline Floats at_least(const Floats& a, const Floats& b) { return each([&](int i) { return a.v[i] >= b.v[i] ? 1.0f : 0.0f; }); }

inline Ints bits_of(const Floats& a) {
    Ints result;
    std::memcpy(result.v, a.v, sizeof result.v);
    return result;
}

inline Bytes load_bytes(const uint8_t* p) {
    Bytes result;
    std::copy_n(p, LANES * QUAD, result.v);
    return result;
}

inline void store_bytes(uint8_t* p, const Bytes& a) { std::copy_n(a.v, LANES * QUAD, p); }

inline Bytes load_signed(const uint8_t* p) { return load_bytes(p); }
inline Ints start_signed(const int32_t*) { return {}; }
inline Ints add_signed(Ints sums, const Bytes& w, const int8_t* x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < QUAD; j++) sums.v[i] += int8_t(w.v[i * QUAD + j]) * x[j];
    return sums;
}

inline Bytes low_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte &= 15;
    return a;
}

inline Bytes high_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte >>= 4;
    return a;
}

inline NibbleSums start_nibbles() { return {}; }
inline NibbleSums add_nibbles(NibbleSums sums, const Bytes& w, const int8_t* x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < QUAD; j++) sums.v[i] += w.v[i * QUAD + j] * x[j];
    return sums;
}

inline Floats to_floats(const NibbleSums& a) { return each([&](int i) { return float(a.v[i]); }); }

inline Pairs load_pairs(const uint16_t* p) { return {p}; }
inline void store_pairs(PairInput* p, Floats x) { store_bfloat16(p, x); }
inline Floats add_pair(Floats sums, Pairs w, const PairInput* x) {
    float first = from_bfloat16(x[0]), second = from_bfloat16(x[1]);
    return each([&](int i) { return sums.v[i] + from_bfloat16(w.v[PAIR * i]) * first + from_bfloat16(w.v[PAIR * i + 1]) * second; });
}

inline void pause_briefly() { std::atomic_signal_fence(std::memory_order_seq_cst); }

#endif

/// e to the power of x, relative error below 3e-7. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial. Below -87: 1e-38.
inline Floats exponential(Floats x) {
    x = smaller(larger(x, broadcast(-87.0f)), broadcast(88.0f));
    Floats n = nearest_whole(x * broadcast(1.44269504f));
    Floats r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, broadcast(coefficient));
    return p * power_of_two(n);
}

inline float exponential(float x) {
    float result[LANES];
    store(result, exponential(broadcast(x)));
    return result[0];
}

/// Natural logarithm of positive normal numbers, relative error below 3e-7 also near 1. x = 2^e m with sqrt(1/2) <= m < sqrt(2);
/// log m = 2 artanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, as a series.
inline Floats logarithm(Floats x) {
    constexpr int32_t ONE = 0x3f800000, ROOT_OF_HALF = 0x3f3504f3, MANTISSA = 0x7fffff;  // bits of floats
    Ints moved = bits_of(x) + spread(ONE - ROOT_OF_HALF);
    Floats e = to_floats(shift_right(moved, 23)) - broadcast(127.0f);
    Floats m = floats_of((moved & spread(MANTISSA)) + spread(ROOT_OF_HALF));
    Floats s = (m - broadcast(1.0f)) / (m + broadcast(1.0f)), z = s * s, p = broadcast(2.0f / 9);
    for (float coefficient : {2.0f / 7, 2.0f / 5, 2.0f / 3}) p = fma(p, z, broadcast(coefficient));
    return fma(e, broadcast(0.69314718f), fma(p * z, s, s + s));
}

inline Floats silu(Floats x) { return x / (broadcast(1.0f) + exponential(broadcast(0.0f) - x)); }

// ------------------------------------------------------------------ 2. memory and threads

/// An array that only grows. What is in it is lost when it does.
template <typename Value>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(values_); }

    Value* data() { return values_; }
    const Value* data() const { return values_; }
    Value& operator[](size_t i) { return values_[i]; }
    const Value& operator[](size_t i) const { return values_[i]; }

    void make_room(size_t size) {
        if (size <= size_) return;
        std::free(values_);
        values_ = static_cast<Value*>(std::aligned_alloc(LINE, (size * sizeof(Value) + LINE - 1) / LINE * LINE));
        if (values_ == nullptr) std::abort();  // nothing of a step could go on
        size_ = size;
    }

  private:
    static constexpr size_t LINE = 64;  // of the cache, in bytes
    Value* values_ = nullptr;
    size_t size_ = 0;
};

/// A list of plain values.
template <typename Item>
struct List {
    Item* items = nullptr;
    int size = 0, capacity = 0;

    List() = default;
    List(const List&) = delete;
    ~List() { std::free(items); }
    Item* begin() const { return items; }
    Item* end() const { return items + size; }

    void add(const Item& item) {
        if (size == capacity) {
            capacity = 2 * capacity + 16;
            items = static_cast<Item*>(std::realloc(items, capacity * sizeof(Item)));
            if (items == nullptr) std::abort();
        }
        items[size++] = item;
    }
};

/// Runs numbered tasks on the caller's thread and the workers. A task goes to whoever comes first, and the caller waits for
/// tasks, not for threads: a worker that the system has put aside delays nobody unless it holds a task.
class ThreadPool {
  public:
    explicit ThreadPool(int num_threads) {
        workers_.make_room(num_threads);
        while (num_workers_ < num_threads - 1 && pthread_create(&workers_[num_workers_], nullptr, work_in, this) == 0) num_workers_++;
    }

    ~ThreadPool() {
        is_closing_.store(true);
        publish(0);
        for (int i = 0; i < num_workers_; i++) pthread_join(workers_[i], nullptr);
        pthread_cond_destroy(&is_published_);
        pthread_mutex_destroy(&mutex_);
    }

    int num_threads() const { return num_workers_ + 1; }

    /// From now on worker i stays on cores[i + 1], and a caller on cores[0] during its `Visit`. False: the system refuses.
    bool pin(const int32_t* cores) {
        for (int i = 0; i < num_workers_; i++)
            if (!bind_to_core(workers_[i], cores[i + 1])) return false;
        callers_core_ = cores[0];
        return Visit(*this).is_bound();
    }

    /// One call from outside. The caller is bound for so long and no longer, because the threads that it starts in between,
    /// and processes, would be born on the same core and stay there.
    class Visit {
      public:
        explicit Visit(const ThreadPool& pool) {
            if (pool.callers_core_ < 0) return;
#ifdef __linux__
            is_bound_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0;
#endif
            is_bound_ = is_bound_ && bind_to_core(pthread_self(), pool.callers_core_);
        }

        ~Visit() {
#ifdef __linux__
            if (is_bound_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
#endif
        }

        Visit(const Visit&) = delete;
        bool is_bound() const { return is_bound_; }

      private:
        bool is_bound_ = false;
#ifdef __linux__
        cpu_set_t before_;
#endif
    };

    /// task: called with 0 to num_tasks - 1.
    template <typename Task>
    void run(int num_tasks, const Task& task) {
        share(num_tasks, &task, [](const void* one, int i) { (*static_cast<const Task*>(one))(i); });
    }

  private:
    static constexpr int SPINS = 2000;   // some 20 to 50 microseconds
    static constexpr int YIELDS = 50;    // then the core is offered to others, then the thread sleeps

    [[gnu::noinline]] void share(int num_tasks, const void* task, void (*call)(const void*, int)) {
        if (num_workers_ == 0 || num_tasks <= 1) {
            for (int i = 0; i < num_tasks; i++) call(task, i);
            return;
        }
        task_ = task;
        call_ = call;
        num_done_.store(0, std::memory_order_relaxed);
        publish(num_tasks);
        while (take_one()) {
        }
        for (int turn = 0; num_done_.load(std::memory_order_acquire) < num_tasks; turn++) wait_a_moment(turn);
    }

    // `ticket_` is generation << 32 | tasks << 16 | next task. A claim is a compare-and-swap of the whole word, so a thread
    // that slept through a generation cannot claim a task of another. It reads `task_` only after its claim, and the caller
    // does not replace `task_` before every claimed task is done.
    void publish(int num_tasks) {
        uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(generation << 32 | uint64_t(num_tasks) << 16);
        if (num_sleeping_.load() == 0) return;
        pthread_mutex_lock(&mutex_);
        pthread_cond_broadcast(&is_published_);
        pthread_mutex_unlock(&mutex_);
    }

    /// Until another ticket than this is published. Either `publish` sees this thread among the sleeping, or this thread sees
    /// the new ticket: both first write, then read, in one order for all (the default of std::atomic).
    void sleep(uint64_t ticket) {
        pthread_mutex_lock(&mutex_);
        num_sleeping_.fetch_add(1);
        while (ticket_.load() == ticket) pthread_cond_wait(&is_published_, &mutex_);
        num_sleeping_.fetch_sub(1);
        pthread_mutex_unlock(&mutex_);
    }

    static bool has_task(uint64_t ticket) { return (ticket & 0xffff) < (ticket >> 16 & 0xffff); }

    bool take_one() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (has_task(ticket)) {
            if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
                call_(task_, int(ticket & 0xffff));
                num_done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    static void* work_in(void* pool) {
        static_cast<ThreadPool*>(pool)->work();
        return nullptr;
    }

    void work() {
        int turn = 0;
        while (!is_closing_.load(std::memory_order_relaxed)) {
            uint64_t ticket = ticket_.load(std::memory_order_acquire);
            if (has_task(ticket)) {
                take_one();
                turn = 0;
            } else if (turn < SPINS + YIELDS) {
                wait_a_moment(turn++);
            } else {
                sleep(ticket);
                turn = 0;
            }
        }
    }

    static bool bind_to_core(pthread_t thread, int core) {
#ifdef __linux__
        cpu_set_t cores;
        CPU_ZERO(&cores);
        if (core < CPU_SETSIZE) CPU_SET(core, &cores);
        return pthread_setaffinity_np(thread, sizeof cores, &cores) == 0;
#else
        return false;
#endif
    }

    static void wait_a_moment(int turn) {
        if (turn < SPINS)
            pause_briefly();
        else
            sched_yield();
    }

    Buffer<pthread_t> workers_;
    int num_workers_ = 0, callers_core_ = -1;
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t is_published_ = PTHREAD_COND_INITIALIZER;
    std::atomic<int> num_sleeping_{0};
    const void* task_ = nullptr;
    void (*call_)(const void*, int) = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> num_done_{0};
    std::atomic<bool> is_closing_{false};
};

constexpr int MAX_TASKS = 0xffff;

// ------------------------------------------------------------------ 3. what Python hands over (library.py has the same)

enum Kind : int32_t {
    BFLOAT16 = 0,    // values [out/16][in/2][16][2] bfloat16
    INT8_GROUP = 1,  // values [out/16][in/4][16][4] int8; scales [out/16][in/32][16] float16
    INT4_GROUP = 2,  // values [out/16][in/32][4][16][4] bytes: low nibble of byte i of quad p is input 4p + i of the group,
                     // high nibble input 16 + 4p + i; value = scale * nibble + minimum, both [out/16][in/32][16] float16
};

struct Matrix {
    int32_t kind, num_out, num_in, padded_in;  // num_out is what was asked for; the blocks hold it padded
    const uint8_t* values;
    const uint16_t *scales, *minimums;

    int num_blocks() const { return (num_out + CHANNELS - 1) / CHANNELS; }
    int num_groups() const { return padded_in / GROUP; }
};

struct Layer {
    Matrix query, key, value, output, gate, up, down;
    const float *input_norm, *post_norm;    // [h]
    const float *qkv_bias, *output_bias;    // [(H + 2K) D], [h]; null where the family has none
    const float *query_norm, *key_norm;     // [D]; null where the family has none
    void* kv_cache;                         // keys [K][blocks][D][block_size], then values [K][blocks][block_size][D]
};

struct Model {
    int32_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, block_size, kv_is_bfloat16;
    int64_t num_blocks;  // of the KV cache
    float norm_eps;
    int32_t unused;
    Matrix embedding, head;
    const float* final_norm;  // [h]
    const Layer* layers;
};

struct Step {
    int32_t num_tokens, num_chunks, num_needed, max_blocks;
    const int32_t* token_ids;             // [N]
    const int64_t* slots;                 // [N] where the token's key and value go; negative: nowhere
    const float *cos, *signed_sin;        // [N, D]; see kernels/rotary.py
    const int32_t *starts, *lengths, *rows;  // [num_chunks]
    const int32_t* block_tables;          // [.., max_blocks]
    const int64_t* needed;                // [num_needed] tokens whose final state is asked for
    float* hidden;                        // [num_needed, h] result
};

// ------------------------------------------------------------------ 4. activations, as the matrices want them

/// M rows of activations: as floats, and in the form that the coming matrices read. There T = TILE_ROWS rows lie side by side, so
/// that a tile finds its inputs of a group in one stretch: [M/T][groups][T rows][32 inputs], and what a group has once [M/T][groups][T].
struct Activations {
    int padded_in = 0;
    bool wants_pairs = false, wants_integers = false;
    Buffer<float> floats;      // [M, padded_in], always filled first
    Buffer<PairInput> pairs;   // rounded to bfloat16
    Buffer<int8_t> integers;   // value = scale * integer
    Buffer<float> scales, weighted_sums;  // weighted: scale * sum of the integers, for formats with a minimum
    Buffer<int32_t> minus_128_sums;

    void prepare_for(std::initializer_list<const Matrix*> matrices, int num_rows) {
        wants_pairs = wants_integers = false;
        for (const Matrix* matrix : matrices) {
            padded_in = matrix->padded_in;
            (matrix->kind == BFLOAT16 ? wants_pairs : wants_integers) = true;
        }
        size_t num_groups = size_t(num_rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * (padded_in / GROUP);
        floats.make_room(num_groups * GROUP);
        if (wants_pairs) pairs.make_room(num_groups * GROUP);
        if (!wants_integers) return;
        integers.make_room(num_groups * GROUP);
        scales.make_room(num_groups);
        weighted_sums.make_room(num_groups);
        minus_128_sums.make_room(num_groups);
    }

    float* row(int m) { return floats.data() + size_t(m) * padded_in; }

    /// Where a row's group lies among the groups; the next row of the tile follows.
    size_t place(int m, int group) const {
        return (size_t(m / TILE_ROWS) * (padded_in / GROUP) + group) * TILE_ROWS + m % TILE_ROWS;
    }

    /// Call when `row(m)` holds `num_in` values.
    [[gnu::noinline]] void finish_row(int m, int num_in) {
        float* x = row(m);
        std::fill(x + num_in, x + padded_in, 0.0f);
        for (int group = 0; group < padded_in / GROUP; group++, x += GROUP) {
            size_t to = place(m, group);
            if (wants_pairs)
                for (int i = 0; i < GROUP; i += LANES) store_pairs(pairs.data() + to * GROUP + i, load(x + i));
            if (wants_integers) quantize_group(x, to);
        }
    }

  private:
    static Floats to_integers(Floats x, float inverse) {
        return nearest_whole(smaller(larger(x * broadcast(inverse), broadcast(-127.0f)), broadcast(127.0f)));
    }

    void quantize_group(const float* x, size_t to) {
        static_assert(GROUP == 2 * LANES);
        Floats low = load(x), high = load(x + LANES);
        float bad = sum(fma(high, broadcast(0.0f), low * broadcast(0.0f)));  // NaN if any value is not finite, else 0
        if (bad != 0) {  // an integer cannot be NaN, its scale can
            std::fill_n(integers.data() + to * GROUP, GROUP, int8_t(0));
            scales[to] = weighted_sums[to] = bad;
            minus_128_sums[to] = 0;
            return;
        }
        float peak = largest(larger(absolute(low), absolute(high))), inverse = peak > 0 ? 127.0f / peak : 0.0f;
        low = to_integers(low, inverse);
        high = to_integers(high, inverse);
        store_int8(integers.data() + to * GROUP, low);
        store_int8(integers.data() + to * GROUP + LANES, high);
        float total = sum(low + high);
        scales[to] = peak / 127.0f;
        weighted_sums[to] = scales[to] * total;
        minus_128_sums[to] = -128 * int32_t(total);
    }
};

// ------------------------------------------------------------------ 5. products
//
// A tile is R rows by one block of 16 channels, held in R registers: weights are read once for R rows. The rows must lie in
// one stretch of TILE_ROWS. out: [R][16].

/// Integer weights come with their scales, as several short streams, and the processor's own guess at what comes next is late.
/// (bfloat16 is one long stream: there it was measured to be slower, but for tiles, which take it faster than memory gives it.)
inline void prefetch_weights(const void* values, int num_bytes) {
    constexpr int AHEAD = 2048, LINE = 64;
    for (int i = 0; i < num_bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(values) + AHEAD + i);
}

template <int R>
void multiply_bfloat16(const Matrix& w, int block, const Activations& x, int first_row, float* out) {
    Floats tile[R];
    for (int r = 0; r < R; r++) tile[r] = broadcast(0.0f);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(w.values) + size_t(block) * w.padded_in * CHANNELS;
    const PairInput* inputs = x.pairs.data() + x.place(first_row, 0) * GROUP;
    for (int g = 0; g < w.num_groups(); g++, inputs += TILE_ROWS * GROUP)
        for (int i = 0; i < GROUP; i += PAIR, values += CHANNELS * PAIR) {
            Pairs weights = load_pairs(values);
            for (int r = 0; r < R; r++) tile[r] = add_pair(tile[r], weights, inputs + r * GROUP + i);
        }
    for (int r = 0; r < R; r++) store(out + r * CHANNELS, tile[r]);
}

template <int R>
void multiply_int8_group(const Matrix& w, int block, const Activations& x, int first_row, float* out) {
    Floats tile[R];
    for (int r = 0; r < R; r++) tile[r] = broadcast(0.0f);
    const uint8_t* values = w.values + size_t(block) * w.padded_in * CHANNELS;
    const uint16_t* scales = w.scales + size_t(block) * w.num_groups() * CHANNELS;
    size_t place = x.place(first_row, 0);
    for (int g = 0; g < w.num_groups(); g++, scales += CHANNELS, place += TILE_ROWS) {
        prefetch_weights(values, GROUP * CHANNELS);
        Ints sums[R];
        for (int r = 0; r < R; r++) sums[r] = start_signed(&x.minus_128_sums[place + r]);
        const int8_t* inputs = x.integers.data() + place * GROUP;
        for (int i = 0; i < GROUP; i += QUAD, values += CHANNELS * QUAD) {
            Bytes weights = load_signed(values);
            for (int r = 0; r < R; r++) sums[r] = add_signed(sums[r], weights, inputs + r * GROUP + i);
        }
        Floats scale = load_half(scales);
        for (int r = 0; r < R; r++) tile[r] = fma(to_floats(sums[r]), scale * broadcast(x.scales[place + r]), tile[r]);
    }
    for (int r = 0; r < R; r++) store(out + r * CHANNELS, tile[r]);
}

/// sum of (scale * nibble + minimum) * x = scale * (nibbles . x) + minimum * (sum of x), group by group.
template <int R>
void multiply_int4_group(const Matrix& w, int block, const Activations& x, int first_row, float* out) {
    Floats tile[R];
    for (int r = 0; r < R; r++) tile[r] = broadcast(0.0f);
    const uint8_t* values = w.values + size_t(block) * w.padded_in * CHANNELS / 2;
    size_t first_scale = size_t(block) * w.num_groups() * CHANNELS, place = x.place(first_row, 0);
    const uint16_t *scales = w.scales + first_scale, *minimums = w.minimums + first_scale;
    for (int g = 0; g < w.num_groups(); g++, scales += CHANNELS, minimums += CHANNELS, place += TILE_ROWS) {
        prefetch_weights(values, GROUP * CHANNELS / 2);
        NibbleSums sums[R];
        for (int r = 0; r < R; r++) sums[r] = start_nibbles();
        const int8_t* inputs = x.integers.data() + place * GROUP;
        for (int i = 0; i < GROUP / 2; i += QUAD, values += CHANNELS * QUAD) {  // a byte holds inputs i and i + 16
            Bytes both = load_bytes(values), near = low_nibbles(both), far = high_nibbles(both);
            for (int r = 0; r < R; r++) sums[r] = add_nibbles(sums[r], near, inputs + r * GROUP + i);
            for (int r = 0; r < R; r++) sums[r] = add_nibbles(sums[r], far, inputs + r * GROUP + GROUP / 2 + i);
        }
        Floats scale = load_half(scales), minimum = load_half(minimums);
        for (int r = 0; r < R; r++) {
            tile[r] = fma(to_floats(sums[r]), scale * broadcast(x.scales[place + r]), tile[r]);
            tile[r] = fma(minimum, broadcast(x.weighted_sums[place + r]), tile[r]);
        }
    }
    for (int r = 0; r < R; r++) store(out + r * CHANNELS, tile[r]);
}

template <int R>
void multiply_tile(const Matrix& w, int block, const Activations& x, int first_row, float* out) {
    if (w.kind == INT8_GROUP) return multiply_int8_group<R>(w, block, x, first_row, out);
    if (w.kind == INT4_GROUP) return multiply_int4_group<R>(w, block, x, first_row, out);
    if constexpr (!HAS_TILES) multiply_bfloat16<R>(w, block, x, first_row, out);  // tiles leave no row of it over
}

#ifdef USE_AMX

// Tile registers: 8 of up to 16 lines of 64 bytes, here named after what they hold.
//   0..3  sums: 16 rows x 16 channels, int32 or float32
//   4     activations of a group: 16 rows x 32 int8           6  the same in bfloat16
//   5     weights of a group: 8 quads x 16 channels x 4 int8  7  16 pairs x 16 channels x 2 bfloat16
// A product reads whole tiles: rows of bfloat16 that nobody asked for are computed from what lies there, and ignored.

struct TileShapes {
    uint8_t palette, start_row, unused[14];
    uint16_t line_bytes[16];
    uint8_t num_lines[16];
};

alignas(64) const TileShapes TILE_SHAPES = {1, 0, {}, {64, 64, 64, 64, 32, 64, 64, 64}, {16, 16, 16, 16, 16, 8, 16, 16}};

/// The tile registers of this thread, shaped at their first use in a task and given back at its end: between tasks they are
/// torch's, and the system saves them with the thread only while they are in use.
class Tiles {
  public:
    ~Tiles() {
        if (are_shaped_) _tile_release();
    }

    void shape() {
        if (!are_shaped_) _tile_loadconfig(&TILE_SHAPES);
        are_shaped_ = true;
    }

  private:
    bool are_shaped_ = false;
};

constexpr int GROUPS_AT_ONCE = 8;  // products that are stored before they are scaled: 8 KB
constexpr int SCALED_ROWS = 8;     // of which the sums, as floats, fit into registers
constexpr int LINE_BYTES = 64;

/// gcc 12 does not know that a tile is loaded from memory: it must not put off what was stored before.
inline void finish_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

/// 16 rows by one block, each group on its own: sums [num_groups][16][16].
inline void multiply_int8_tiles(const uint8_t* weights, const int8_t* inputs, int num_groups, int32_t* sums) {
    for (int g = 0; g < num_groups; g++) {
        _tile_zero(0);
        _tile_loadd(4, inputs + g * TILE_ROWS * GROUP, GROUP);
        _tile_loadd(5, weights + g * GROUP * CHANNELS, LINE_BYTES);
        _tile_dpbssd(0, 4, 5);
        _tile_stored(0, sums + g * TILE_ROWS * CHANNELS, LINE_BYTES);
    }
}

/// out [8][16] += sums, by the same operations in the same order as in registers. scales, minimums: [num_groups][16].
inline void add_scaled(const int32_t* sums, const uint16_t* scales, const uint16_t* minimums, const Activations& x, size_t place,
                       int num_groups, float* out) {
    Floats tile[SCALED_ROWS];
    for (int r = 0; r < SCALED_ROWS; r++) tile[r] = load(out + r * CHANNELS);
    for (int g = 0; g < num_groups; g++, sums += TILE_ROWS * CHANNELS, place += TILE_ROWS) {
        Floats scale = load_half(scales + g * CHANNELS);
        for (int r = 0; r < SCALED_ROWS; r++)
            tile[r] = fma(to_floats(load_ints(sums + r * CHANNELS)), scale * broadcast(x.scales[place + r]), tile[r]);
        if (minimums == nullptr) continue;
        Floats minimum = load_half(minimums + g * CHANNELS);
        for (int r = 0; r < SCALED_ROWS; r++) tile[r] = fma(minimum, broadcast(x.weighted_sums[place + r]), tile[r]);
    }
    for (int r = 0; r < SCALED_ROWS; r++) store(out + r * CHANNELS, tile[r]);
}

/// Nibbles as bytes, in the order of int8 weights.
inline void unpack_nibbles(const uint8_t* packed, int num_groups, uint8_t* out) {
    constexpr int HALF = GROUP / 2 * CHANNELS;  // bytes: inputs 0 to 15 of a group, then 16 to 31
    for (int g = 0; g < num_groups; g++, packed += HALF, out += 2 * HALF)
        for (int i = 0; i < HALF; i += LANES * QUAD) {
            Bytes both = load_bytes(packed + i);
            store_bytes(out + i, low_nibbles(both));
            store_bytes(out + HALF + i, high_nibbles(both));
        }
    finish_stores();
}

/// Weights in int8 or 4 bits, whole sixteens of rows.
void multiply_groups_by_tiles(const Matrix& w, int block, const Activations& x, int first_row, int end_row, float* out) {
    alignas(LINE_BYTES) uint8_t unpacked[GROUPS_AT_ONCE * GROUP * CHANNELS];
    alignas(LINE_BYTES) int32_t sums[GROUPS_AT_ONCE * TILE_ROWS * CHANNELS];
    int group_bytes = GROUP * CHANNELS / (w.kind == INT4_GROUP ? 2 : 1);
    std::fill_n(out, (end_row - first_row) * CHANNELS, 0.0f);
    for (int g = 0; g < w.num_groups(); g += GROUPS_AT_ONCE) {
        int num_groups = std::min(GROUPS_AT_ONCE, w.num_groups() - g);
        size_t first_group = size_t(block) * w.num_groups() + g, first_scale = first_group * CHANNELS;
        const uint8_t* weights = w.values + first_group * group_bytes;
        if (w.kind == INT4_GROUP) {
            unpack_nibbles(weights, num_groups, unpacked);
            weights = unpacked;
        }
        for (int row = first_row; row < end_row; row += TILE_ROWS) {
            size_t place = x.place(row, g);
            multiply_int8_tiles(weights, x.integers.data() + place * GROUP, num_groups, sums);
            for (int r = 0; r < TILE_ROWS; r += SCALED_ROWS)
                add_scaled(sums + r * CHANNELS, w.scales + first_scale, w.minimums ? w.minimums + first_scale : nullptr, x,
                           place + r, num_groups, out + (row - first_row + r) * CHANNELS);
        }
    }
}

/// Up to four tiles of rows, because a product waits for the sum it adds to. out: room for whole sixteens of rows.
void multiply_bfloat16_by_tiles(const Matrix& w, int block, const Activations& x, int first_row, int end_row, float* out) {
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(w.values) + size_t(block) * w.padded_in * CHANNELS;
    const PairInput* inputs = x.pairs.data() + x.place(first_row, 0) * GROUP;
    size_t next = size_t(w.padded_in) * TILE_ROWS;  // from a tile of rows to the next
    int num_tiles = (end_row - first_row + TILE_ROWS - 1) / TILE_ROWS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = 0; g < w.num_groups(); g++, weights += GROUP * CHANNELS, inputs += TILE_ROWS * GROUP) {
        prefetch_weights(weights, GROUP * CHANNELS * int(sizeof *weights));
        _tile_loadd(7, weights, LINE_BYTES);
        _tile_loadd(6, inputs, LINE_BYTES);
        _tile_dpbf16ps(0, 6, 7);
        if (num_tiles == 1) continue;
        _tile_loadd(6, inputs + next, LINE_BYTES);
        _tile_dpbf16ps(1, 6, 7);
        if (num_tiles == 2) continue;
        _tile_loadd(6, inputs + 2 * next, LINE_BYTES);
        _tile_dpbf16ps(2, 6, 7);
        if (num_tiles == 3) continue;
        _tile_loadd(6, inputs + 3 * next, LINE_BYTES);
        _tile_dpbf16ps(3, 6, 7);
    }
    constexpr int SIZE = TILE_ROWS * CHANNELS;
    _tile_stored(0, out, LINE_BYTES);
    if (num_tiles > 1) _tile_stored(1, out + SIZE, LINE_BYTES);
    if (num_tiles > 2) _tile_stored(2, out + 2 * SIZE, LINE_BYTES);
    if (num_tiles > 3) _tile_stored(3, out + 3 * SIZE, LINE_BYTES);
}

/// Returns the first row that is left over. All rows of bfloat16 go by tiles, because there sums have another order; of integers,
/// where registers give the same bits, only whole tiles do.
int multiply_by_tiles(const Matrix& w, int block, const Activations& x, int first_row, int end_row, float* out, Tiles& tiles) {
    if (w.kind != BFLOAT16) end_row -= (end_row - first_row) % TILE_ROWS;
    if (end_row == first_row) return first_row;
    tiles.shape();
    finish_stores();
    (w.kind == BFLOAT16 ? multiply_bfloat16_by_tiles : multiply_groups_by_tiles)(w, block, x, first_row, end_row, out);
    return end_row;
}

#else

struct Tiles {};
inline int multiply_by_tiles(const Matrix&, int, const Activations&, int first_row, int, float*, Tiles&) { return first_row; }

#endif

constexpr int ROWS_IN_CACHE = 64;  // their activations stay near while a task's blocks pass

/// At most ROWS_IN_CACHE rows, of which the first is a multiple of TILE_ROWS. out: [ROWS_IN_CACHE][16].
void multiply_block(const Matrix& w, int block, const Activations& x, int first_row, int end_row, float* out, Tiles& tiles) {
    int row = multiply_by_tiles(w, block, x, first_row, end_row, out, tiles);
    auto as_long_as = [&](auto tile, int num_rows) {
        for (; row + num_rows <= end_row; row += num_rows) tile(w, block, x, row, out + (row - first_row) * CHANNELS);
    };
    if constexpr (MAX_ROWS == 8) as_long_as(multiply_tile<MAX_ROWS>, MAX_ROWS);
    as_long_as(multiply_tile<4>, 4);
    as_long_as(multiply_tile<2>, 2);
    as_long_as(multiply_tile<1>, 1);
}

// ------------------------------------------------------------------ 6. attention
//
// Keys are seen in segments of a fixed length, each from scratch, and segments are put together in their order. So threads
// may share one long row, and its result is the same bits whether they do or not.

constexpr int TILE_TOKENS = 8;
constexpr int TILE_KEYS = 2 * LANES;
constexpr int SEGMENT_KEYS = 32 * TILE_KEYS;

/// Consecutive tokens of one chunk. A row attends to the keys [0, first_position + its place in the tile].
struct QueryTile {
    int first_token, num_tokens, first_position, first_out;  // first_out: line of the result
    const int32_t* block_table;
    int first_piece = 0;  // its place among the pieces of work of all tiles

    int num_keys() const { return first_position + num_tokens; }
    int num_segments() const { return (num_keys() + SEGMENT_KEYS - 1) / SEGMENT_KEYS; }
    bool is_shared() const { return num_tokens == 1 && num_segments() > 1; }  // by threads; many tokens are tiles enough
    int num_pieces() const { return is_shared() ? num_segments() : 1; }       // for each KV head
};

/// What a row has seen of its keys: `mixed` = sum of exp(score - peak) * value, `total` = sum of exp(score - peak).
struct Seen {
    float *mixed, *peaks, *totals;  // [rows][D], [rows], [rows]

    static size_t size(int num_rows, int head_dim) { return size_t(num_rows) * (head_dim + 2); }

    Seen(float* memory, int num_rows, int head_dim)
        : mixed(memory), peaks(memory + size_t(num_rows) * head_dim), totals(peaks + num_rows) {}

    void reset(int num_rows, int head_dim) const {
        std::fill_n(mixed, size_t(num_rows) * head_dim, 0.0f);
        std::fill_n(peaks, num_rows, LOWEST);
        std::fill_n(totals, num_rows, 0.0f);
    }
};

/// One task of attention.
struct Piece {
    const QueryTile* tile;
    int kv_head, segment;  // segment: of a shared tile, else 0
};

/// Memory of one thread: keys and values as floats, and what the rows of a tile have seen.
struct AttentionScratch {
    Buffer<float> keys, values;        // [D][TILE_KEYS], [TILE_KEYS][D]
    Buffer<float> of_segment, of_all;  // `Seen`
};

/// scores[j] = query . keys[.][j]; those from `num_keys` on become minus infinity. Even and odd dimensions are summed apart,
/// because a processor does not wait for one sum while it adds to another.
void score_keys(const float* query, const float* keys, int head_dim, int num_keys, float* scores) {
    Floats even[2] = {broadcast(0.0f), broadcast(0.0f)}, odd[2] = {broadcast(0.0f), broadcast(0.0f)};
    for (int d = 0; d < head_dim; d += 2, keys += 2 * TILE_KEYS)
        for (int i = 0; i < 2; i++) {
            even[i] = fma(load(keys + i * LANES), broadcast(query[d]), even[i]);
            odd[i] = fma(load(keys + TILE_KEYS + i * LANES), broadcast(query[d + 1]), odd[i]);
        }
    for (int i = 0; i < 2; i++) store(scores + i * LANES, even[i] + odd[i]);
    std::fill(scores + num_keys, scores + TILE_KEYS, LOWEST);
}

/// mixed = mixed * decay + sum of weights[j] * values[j], for NUM_REGISTERS * 16 dimensions.
template <int NUM_REGISTERS>
inline void mix_values(const float* weights, const float* values, int head_dim, int num_keys, float decay, float* mixed) {
    Floats sums[NUM_REGISTERS];
    for (int i = 0; i < NUM_REGISTERS; i++) sums[i] = load(mixed + i * LANES) * broadcast(decay);
    for (int j = 0; j < num_keys; j++, values += head_dim) {
        Floats weight = broadcast(weights[j]);
        for (int i = 0; i < NUM_REGISTERS; i++) sums[i] = fma(weight, load(values + i * LANES), sums[i]);
    }
    for (int i = 0; i < NUM_REGISTERS; i++) store(mixed + i * LANES, sums[i]);
}

/// One row sees `num_keys` more keys: softmax over all so far, without having kept the earlier scores (online softmax).
void attend_keys(const float* query, const AttentionScratch& scratch, const Seen& seen, int row, int head_dim, int num_keys) {
    float scores[TILE_KEYS];
    score_keys(query, scratch.keys.data(), head_dim, num_keys, scores);
    float peak = std::max(seen.peaks[row], largest(larger(load(scores), load(scores + LANES))));
    float decay = exponential(seen.peaks[row] - peak);
    for (int j = 0; j < TILE_KEYS; j += LANES) store(scores + j, exponential(load(scores + j) - broadcast(peak)));
    std::fill(scores + num_keys, scores + TILE_KEYS, 0.0f);
    seen.totals[row] = seen.totals[row] * decay + sum(load(scores) + load(scores + LANES));
    seen.peaks[row] = peak;
    float* mixed = seen.mixed + size_t(row) * head_dim;
    const float* values = scratch.values.data();
    int d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) mix_values<4>(scores, values + d, head_dim, num_keys, decay, mixed + d);
    for (; d < head_dim; d += LANES) mix_values<1>(scores, values + d, head_dim, num_keys, decay, mixed + d);
}

/// A row that has seen `all` has now seen `more` too.
void put_together(const Seen& all, const Seen& more, int row, int head_dim) {
    float peak = std::max(all.peaks[row], more.peaks[row]);
    float of_all = exponential(all.peaks[row] - peak), of_more = exponential(more.peaks[row] - peak);
    float *to = all.mixed + size_t(row) * head_dim, *from = more.mixed + size_t(row) * head_dim;
    for (int d = 0; d < head_dim; d += LANES)
        store(to + d, fma(load(to + d), broadcast(of_all), load(from + d) * broadcast(of_more)));
    all.totals[row] = all.totals[row] * of_all + more.totals[row] * of_more;
    all.peaks[row] = peak;
}

/// One layer's keys and values, bfloat16 or float32. A block holds its keys with the positions side by side.
struct Cache {
    const Model& model;
    void* memory;

    size_t block_of(int which, int kv_head, int64_t block) const {  // which: 0 keys, 1 values
        size_t number = (size_t(which) * model.num_kv_heads + kv_head) * size_t(model.num_blocks) + size_t(block);
        return number * model.block_size * model.head_dim;
    }

    Floats load_16(size_t at) const {
        if (model.kv_is_bfloat16) return load_bfloat16(static_cast<const uint16_t*>(memory) + at);
        return load(static_cast<const float*>(memory) + at);
    }

    float load_one(size_t at) const {
        if (!model.kv_is_bfloat16) return static_cast<const float*>(memory)[at];
        uint32_t bits = uint32_t(static_cast<const uint16_t*>(memory)[at]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }

    /// 16 values of a line, `stride` apart in the cache.
    void store_16(size_t at, size_t stride, const float* x) const {
        uint16_t halves[LANES];
        if (model.kv_is_bfloat16) store_bfloat16(halves, load(x));
        for (int i = 0; i < LANES; i++) {
            if (model.kv_is_bfloat16)
                static_cast<uint16_t*>(memory)[at + i * stride] = halves[i];
            else
                static_cast<float*>(memory)[at + i * stride] = x[i];
        }
    }

    void write(int kv_head, int64_t slot, const float* key, const float* value) const {
        int64_t block = slot / model.block_size, within = slot % model.block_size;
        size_t key_block = block_of(0, kv_head, block), line = block_of(1, kv_head, block) + size_t(within) * model.head_dim;
        for (int d = 0; d < model.head_dim; d += LANES) {
            store_16(key_block + size_t(d) * model.block_size + within, model.block_size, key + d);
            store_16(line + d, 1, value + d);
        }
    }

    /// `num_keys` keys from position `first` on, of the line `block_table`. What stands beyond them in `keys` is never used.
    void read(const int32_t* block_table, int kv_head, int first, int num_keys, float* keys, float* values) const {
        int D = model.head_dim, block_size = model.block_size, length;
        for (int j = 0; j < num_keys; j += length) {
            int block = block_table[(first + j) / block_size], within = (first + j) % block_size;
            length = std::min(block_size - within, num_keys - j);
            size_t lines = block_of(1, kv_head, block) + size_t(within) * D, columns = block_of(0, kv_head, block) + within;
            for (int i = 0; i < length * D; i += LANES) store(values + size_t(j) * D + i, load_16(lines + i));
            for (int d = 0; d < D; d++, columns += block_size) {
                float* to = keys + size_t(d) * TILE_KEYS + j;
                if (block_size % LANES == 0)
                    for (int i = 0; i < length; i += LANES) store(to + i, load_16(columns + i));
                else
                    for (int i = 0; i < length; i++) to[i] = load_one(columns + i);
            }
        }
    }
};

/// A tile and a KV head: whose queries see which keys. Its rows are [num_tokens][group].
struct Attending {
    const Cache& cache;
    const QueryTile& tile;
    int kv_head;
    const float* qkv;  // [N, (H + 2K) D], queries turned and scaled
    int head_dim = cache.model.head_dim, group = cache.model.num_heads / cache.model.num_kv_heads;
    int num_rows = tile.num_tokens * group;

    const float* queries(int t) const {
        int num_heads = cache.model.num_heads + 2 * cache.model.num_kv_heads;
        return qkv + (size_t(tile.first_token + t) * num_heads + kv_head * group) * head_dim;
    }

    /// How many of the keys from `first` on a token sees.
    int num_seen(int t, int first) const { return tile.first_position + t + 1 - first; }

    void see_segment(int segment, AttentionScratch& scratch, const Seen& seen) const {
        int end = std::min(tile.num_keys(), (segment + 1) * SEGMENT_KEYS);
        scratch.keys.make_room(size_t(TILE_KEYS) * head_dim);
        scratch.values.make_room(size_t(TILE_KEYS) * head_dim);
        seen.reset(num_rows, head_dim);
        for (int first = segment * SEGMENT_KEYS; first < end; first += TILE_KEYS) {
            int num_loaded = std::min(TILE_KEYS, end - first);
            cache.read(tile.block_table, kv_head, first, num_loaded, scratch.keys.data(), scratch.values.data());
            for (int t = 0; t < tile.num_tokens; t++) {
                int num_keys = std::min(num_loaded, num_seen(t, first));
                if (num_keys <= 0) continue;
                for (int g = 0; g < group; g++)
                    attend_keys(queries(t) + size_t(g) * head_dim, scratch, seen, t * group + g, head_dim, num_keys);
            }
        }
    }

    /// All segments, one after another.
    Seen see_all(AttentionScratch& scratch) const {
        size_t size = Seen::size(num_rows, head_dim);
        scratch.of_segment.make_room(size);
        scratch.of_all.make_room(size);
        Seen all(scratch.of_all.data(), num_rows, head_dim), one(scratch.of_segment.data(), num_rows, head_dim);
        see_segment(0, scratch, all);
        for (int segment = 1; segment < tile.num_segments(); segment++) {
            see_segment(segment, scratch, one);
            for (int row = 0; row < num_rows; row++)
                if (num_seen(row / group, segment * SEGMENT_KEYS) > 0) put_together(all, one, row, head_dim);
        }
        return all;
    }

    /// out: lines of H D.
    void write(const Seen& all, Activations& out) const {
        for (int row = 0; row < num_rows; row++) {
            float* line = out.row(tile.first_out + row / group) + (size_t(kv_head) * group + row % group) * head_dim;
            Floats inverse = broadcast(1.0f / all.totals[row]);
            for (int d = 0; d < head_dim; d += LANES) store(line + d, load(all.mixed + size_t(row) * head_dim + d) * inverse);
        }
    }
};

AttentionScratch& scratch_of_this_thread() {
    thread_local AttentionScratch scratch;
    return scratch;
}

// ------------------------------------------------------------------ 7. rows: norms, rotary, embedding

/// out = x / sqrt(mean(x^2) + eps) * weight. Sizes that are no multiple of 16 end with single values.
void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
    int whole = size / LANES * LANES;
    Floats squares = broadcast(0.0f);
    for (int i = 0; i < whole; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int i = whole; i < size; i++) total += x[i] * x[i];
    float scale = 1.0f / std::sqrt(total / float(size) + eps);
    for (int i = 0; i < whole; i += LANES) store(out + i, load(x + i) * broadcast(scale) * load(weight + i));
    for (int i = whole; i < size; i++) out[i] = x[i] * scale * weight[i];
}

/// Dimension i turns with dimension i + D/2; the result is multiplied by `factor`. Halves may end with single values.
void rotate_head(float* head, const float* cos, const float* signed_sin, int head_dim, float factor) {
    int half = head_dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        Floats a = load(head + i), b = load(head + half + i), scale = broadcast(factor);
        store(head + i, fma(a, load(cos + i), b * load(signed_sin + i)) * scale);
        store(head + half + i, fma(b, load(cos + half + i), a * load(signed_sin + half + i)) * scale);
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = (a * cos[i] + b * signed_sin[i]) * factor;
        head[half + i] = (b * cos[half + i] + a * signed_sin[half + i]) * factor;
    }
}

/// One row of a packed matrix, as floats: how the embedding is looked up, also in a table that is the output head too.
void unpack_row(const Matrix& w, int row, float* out) {
    int block = row / CHANNELS, channel = row % CHANNELS;
    float scales[LANES] = {}, minimums[LANES] = {};  // of the block's channels
    for (int i = 0; i < w.num_in; i++) {
        int group = block * w.num_groups() + i / GROUP, within = i % GROUP;
        if (within == 0 && w.scales) store(scales, load_half(w.scales + size_t(group) * CHANNELS));
        if (within == 0 && w.minimums) store(minimums, load_half(w.minimums + size_t(group) * CHANNELS));
        const uint8_t* values = w.values + size_t(group) * GROUP * CHANNELS;
        if (w.kind == BFLOAT16) {
            size_t place = (size_t(group) * (GROUP / PAIR) + within / PAIR) * CHANNELS + channel;
            uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(w.values)[place * PAIR + i % PAIR]) << 16;
            std::memcpy(out + i, &bits, 4);
        } else if (w.kind == INT8_GROUP) {
            out[i] = float(int8_t(values[(within / QUAD * CHANNELS + channel) * QUAD + i % QUAD])) * scales[channel];
        } else {
            const uint8_t* nibbles = w.values + size_t(group) * GROUP * CHANNELS / 2;
            int byte = nibbles[(within % (GROUP / 2) / QUAD * CHANNELS + channel) * QUAD + i % QUAD];
            out[i] = float(within < GROUP / 2 ? byte & 15 : byte >> 4) * scales[channel] + minimums[channel];
        }
    }
}

// ------------------------------------------------------------------ 8. drawing a token
//
// What comes after the edits of logits in sampling/: grammars' masks, temperature, min_p, top_k and top_p, by the noise that
// sampling/gumbel.py specifies. A mask and top_k leave blocks of 16 neighbours, and only those are weighed.

constexpr float FORBIDDEN = -1e20f;  // as in sampling/penalties.py

/// Lines of logits, [M, V], and how each draws.
struct Draw {
    int32_t num_rows, vocab_size;
    const float* logits;
    const int32_t *hashes, *keys;              // [V], [M]
    const float *inverse_temperature, *top_p;  // [M]; 0: the most likely token; top_p from 1 on: all tokens
    const int64_t* top_k;                      // [M]; below 1 or from V on: all tokens
    const float* min_p;                        // [M] or null
    const uint32_t* masks;                     // [masks, words]: token t may be drawn where bit t % 32 of word t / 32 is set
    const int32_t* mask_lines;                 // [M], -1: without a mask; null: nobody has one
    int64_t* token_ids;                        // [M] result; -1: the logits are not finite numbers

    const uint32_t* mask(int m) const {
        if (!mask_lines || mask_lines[m] < 0) return nullptr;
        return masks + mask_lines[m] * ((size_t(vocab_size) + 31) / 32);
    }
};

/// Values of tokens in the order of their ids: of all tokens, or of blocks of 16 that begin at `firsts`.
struct Line {
    const float* values;
    int size;
    const int32_t* firsts;  // [size / 16], null: all tokens

    /// 16 values; minus infinity beyond the end.
    Floats at(int i) const {
        float rest[LANES];
        if (i + LANES <= size) return load(values + i);
        std::fill(rest, rest + LANES, LOWEST);
        std::copy(values + i, values + size, rest);
        return load(rest);
    }

    int token(int i) const { return firsts ? firsts[i / LANES] + i % LANES : i; }
};

/// Copies of the blocks that a mask leaves something of.
class Kept {
  public:
    /// `allowed(i)`: 16 bits, of the values from i on. Those that stay are raised to `floor`, the others become minus infinity.
    template <typename Allowed>
    Line keep(const Line& line, float floor, const Allowed& allowed) {
        alignas(64) static constexpr int32_t BITS[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        int size = 0, num_blocks = (line.size + LANES - 1) / LANES;
        values_.make_room(size_t(num_blocks) * LANES);
        firsts_.make_room(num_blocks);
        for (int i = 0; i < line.size; i += LANES) {
            uint32_t bits = allowed(i);
            if (i + LANES > line.size) bits &= (1u << (line.size - i)) - 1;
            if (bits == 0) continue;
            Floats ceiling = (to_floats(spread(int32_t(bits)) & load_ints(BITS)) - broadcast(0.5f)) * broadcast(INFINITY);
            store(values_.data() + size, smaller(ceiling, larger(broadcast(floor), line.at(i))));  // NaN stays
            firsts_[size / LANES] = line.token(i);
            size += LANES;
        }
        return {values_.data(), size, firsts_.data()};
    }

  private:
    Buffer<float> values_;
    Buffer<int32_t> firsts_;
};

/// 0, or NaN where any is NaN.
float nan_of(const Line& logits) {
    Floats bad = broadcast(0.0f);  // `larger` and `smaller` hand on a NaN on their right
    for (int i = 0; i < logits.size; i += LANES)
        bad = fma(larger(broadcast(-3.4e38f), smaller(broadcast(3.4e38f), logits.at(i))), broadcast(0.0f), bad);
    return sum(bad);
}

/// The largest, or NaN where any is NaN or plus infinity; minus infinity stands for tokens that are not allowed.
float finite_peak(const Line& logits) {
    Floats peak = broadcast(LOWEST), bad = broadcast(0.0f);
    for (int i = 0; i < logits.size; i += LANES) {
        Floats x = logits.at(i);
        peak = larger(peak, x);
        bad = fma(larger(broadcast(-3.4e38f), x), broadcast(0.0f), bad);
    }
    return largest(peak) + sum(bad);
}

/// Where `value`, the largest, comes first.
int place_of(const Line& line, float value) {
    constexpr int STRIDE = 8 * LANES;  // adding a register's lanes up, or comparing them, takes longer than reading it
    int i = 0;
    for (; i + STRIDE <= line.size; i += STRIDE) {
        Floats top = line.at(i);
        for (int j = LANES; j < STRIDE; j += LANES) top = larger(top, line.at(i + j));
        if (largest(top) >= value) break;
    }
    return int(std::find(line.values + i, line.values + line.size, value) - line.values);
}

/// The first of the largest.
int leader_of(const Line& line) {
    Floats best = line.at(0);
    for (int i = LANES; i < line.size; i += LANES) best = larger(best, line.at(i));
    return place_of(line, largest(best));
}

/// The most likely tokens of a line, of equals those with the lowest ids.
class TopK {
  public:
    Line keep(const Line& line, int count) {
        find(line, count);
        int num_blocks = (line.size + LANES - 1) / LANES;
        bits_.make_room(num_blocks);
        std::fill_n(bits_.data(), num_blocks, uint16_t(0));
        for (const Candidate& one : best_) bits_[one.place / LANES] |= uint16_t(1 << one.place % LANES);
        return kept_.keep(line, LOWEST, [&](int i) { return bits_[i / LANES]; });
    }

  private:
    struct Candidate {
        float logit;
        int32_t place;

        bool operator<(const Candidate& other) const {  // comes before
            return logit > other.logit || (logit == other.logit && place < other.place);
        }
    };

    /// Fills `best_`, by one pass: what comes later must be more likely than the last of the best so far.
    void find(const Line& line, int count) {
        float least = LOWEST;
        best_.size = 0;
        auto drop_the_rest = [&] {
            std::nth_element(best_.begin(), best_.begin() + count - 1, best_.end());
            best_.size = count;
            least = best_.items[count - 1].logit;
        };
        for (int i = 0; i < line.size; i += LANES) {
            if (!(largest(line.at(i)) > least)) continue;
            for (int place = i; place < std::min(i + LANES, line.size); place++)
                if (line.values[place] > least) best_.add({line.values[place], place});
            if (best_.size >= 2 * count + LANES) drop_the_rest();
        }
        if (best_.size > count) drop_the_rest();
    }

    List<Candidate> best_;
    Buffer<uint16_t> bits_;
    Kept kept_;
};

/// -log(u) of 16 tokens.
inline Floats noise(const int32_t* hashes, int32_t key) {
    Ints x = load_ints(hashes) + spread(key);
    x = (x ^ shift_right(x, 16)) * spread(0x7feb352d);
    x = (x ^ shift_right(x, 15)) * spread(int32_t(0x846ca68b));
    x = shift_right(x ^ shift_right(x, 16), 9);
    return broadcast(0.0f) - logarithm((to_floats(x) + broadcast(0.5f)) * broadcast(1.0f / 8388608));
}

/// How much the tokens weigh that are more likely than `leader`, or as likely with a lower id. Others leave the race if the
/// leader is not within `nucleus`, and then it goes on.
bool is_outside(const Line& logits, int leader, float nucleus, const float* weights, float* scores) {
    float limit = logits.values[leader], above = std::nextafter(limit, INFINITY);
    auto ahead = [&](int i) {  // 1 or 0: ids up to the leader's need `limit`, those after it more
        float limits[LANES];
        for (int j = 0; j < LANES; j++) limits[j] = i + j < leader ? limit : above;
        return at_least(logits.at(i), load(limits));
    };
    Floats total = broadcast(0.0f);
    for (int i = 0; i < logits.size; i += LANES) total = fma(ahead(i), load(weights + i), total);
    float weight = sum(total);
    if (!(weight >= nucleus && weight > 0)) return false;
    for (int i = 0; i < logits.size; i += LANES) store(scores + i, ahead(i) * load(scores + i));
    return true;
}

/// The token that wins among those of `logits`, whose largest is `peak`.
int race(const Draw& draw, int m, const Line& logits, float peak) {
    thread_local Buffer<float> weights, scores;
    thread_local Buffer<int32_t> last_hashes;
    int size = draw.vocab_size, padded = (logits.size + LANES - 1) / LANES * LANES;
    weights.make_room(padded);
    scores.make_room(padded);
    last_hashes.make_room(LANES);
    std::copy(draw.hashes + size / LANES * LANES, draw.hashes + size, last_hashes.data());
    Floats inverse = broadcast(draw.inverse_temperature[m]), least = broadcast(draw.min_p ? draw.min_p[m] : 0.0f);
    Floats total = broadcast(0.0f);
    for (int i = 0; i < padded; i += LANES) {
        int token = logits.token(i);
        Floats weight = exponential((logits.at(i) - broadcast(peak)) * inverse);
        weight = weight * at_least(weight, least);
        total = total + weight;
        store(weights.data() + i, weight);
        store(scores.data() + i, weight / noise(token + LANES <= size ? draw.hashes + token : last_hashes.data(), draw.keys[m]));
    }
    float nucleus = draw.top_p[m] < 1 ? draw.top_p[m] * sum(total) : INFINITY;
    Line line{scores.data(), padded, nullptr};
    int leader = leader_of(line);
    while (is_outside(logits, leader, nucleus, weights.data(), scores.data())) leader = leader_of(line);
    return logits.token(leader);
}

int64_t draw_token(const Draw& draw, int m) {
    thread_local Kept allowed;
    thread_local TopK top_k;
    Line logits{draw.logits + size_t(m) * draw.vocab_size, draw.vocab_size, nullptr};
    if (const uint32_t* mask = draw.mask(m)) {
        if (std::isnan(nan_of(logits))) return -1;
        logits = allowed.keep(logits, FORBIDDEN, [&](int i) { return mask[i / 32] >> i % 32 & 0xffff; });
    }
    float peak = finite_peak(logits);
    if (!(std::fabs(peak) < INFINITY)) return -1;
    if (draw.inverse_temperature[m] == 0) return logits.token(place_of(logits, peak));
    int64_t count = draw.top_k[m];
    if (0 < count && count < draw.vocab_size) logits = top_k.keep(logits, int(count));
    return race(draw, m, logits, peak);
}

// ------------------------------------------------------------------ 9. the step

class Decoder {
  public:
    Decoder(const Model& model, int num_threads) : model_(model), pool_(num_threads) {}

    ThreadPool& pool() { return pool_; }

    void forward(const Step& step) {
        ThreadPool::Visit visit(pool_);
        int num_tokens = step.num_tokens, h = model_.hidden_size;
        make_query_tiles(step);
        residual_.make_room(size_t(num_tokens) * h);
        each_row(num_tokens, [&](int m) { unpack_row(model_.embedding, step.token_ids[m], residual(m)); });
        for (int i = 0; i < model_.num_layers; i++) {
            const Layer& layer = model_.layers[i];
            bool is_last = i == model_.num_layers - 1;
            project_and_store(layer, step);
            if (is_last && step.num_needed == 0) return;
            if (is_last) keep_needed_rows(step);
            int num_rows = is_last ? step.num_needed : num_tokens;
            attend(layer, is_last ? needed_tiles_ : tiles_, num_rows);
            feed_forward(layer, num_rows);
        }
        each_row(step.num_needed, [&](int m) {
            rms_norm(residual(m), model_.final_norm, h, model_.norm_eps, step.hidden + size_t(m) * h);
        });
    }

    void draw(const Draw& draw) {
        ThreadPool::Visit visit(pool_);
        each_item(draw.num_rows, [&](int m) { draw.token_ids[m] = draw_token(draw, m); });
    }

    /// hidden: [M, h] -> logits: [M, V].
    void logits(const float* hidden, int num_rows, float* out) { multiply_plain(model_.head, hidden, num_rows, out); }

    [[gnu::noinline]] void multiply_plain(const Matrix& w, const float* x, int num_rows, float* out) {
        ThreadPool::Visit visit(pool_);
        activations_.prepare_for({&w}, num_rows);
        each_row(num_rows, [&](int m) {
            std::copy_n(x + size_t(m) * w.num_in, w.num_in, activations_.row(m));
            activations_.finish_row(m, w.num_in);
        });
        multiply({&w}, activations_, num_rows, [&](int, int m, int block, Floats sums) {
            store_channels(out + size_t(m) * w.num_out, block, w.num_out, sums);
        });
    }

  private:
    static constexpr int ROWS_PER_TASK = 4;     // of the work that is a few microseconds a row
    static constexpr int BLOCKS_PER_TASK = 4;   // 64 output channels, fewer where the threads would not share well
    static constexpr int TASKS_PER_THREAD = 8;

    float* residual(int m) { return residual_.data() + size_t(m) * model_.hidden_size; }
    int qkv_size() const { return (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim; }

    template <typename Item>
    void each_item(int num_items, const Item& item, int per_task = 1) {
        per_task = std::max(per_task, (num_items + MAX_TASKS - 1) / MAX_TASKS);
        pool_.run((num_items + per_task - 1) / per_task, [&](int task) {
            for (int i = task * per_task; i < std::min(num_items, (task + 1) * per_task); i++) item(i);
        });
    }

    template <typename Row>
    void each_row(int num_rows, const Row& row) {
        each_item(num_rows, row, ROWS_PER_TASK);
    }

    /// Several matrices of the same input, as if they were one above the other. finish: (which matrix, row, block, sums).
    template <typename Finish>
    void multiply(std::initializer_list<const Matrix*> matrices, const Activations& x, int num_rows, const Finish& finish) {
        int num_blocks = 0;
        for (const Matrix* matrix : matrices) num_blocks += matrix->num_blocks();
        each_block(num_blocks, num_rows, [&](int block, int row, int end_row, Tiles& tiles) {
            float sums[ROWS_IN_CACHE * CHANNELS];
            int which = 0;
            while (block >= matrices.begin()[which]->num_blocks()) block -= matrices.begin()[which++]->num_blocks();
            multiply_block(*matrices.begin()[which], block, x, row, end_row, sums, tiles);
            for (int m = row; m < end_row; m++) finish(which, m, block, load(sums + (m - row) * CHANNELS));
        });
    }

    /// one: (block, first row, end row, the thread's tiles), for all rows of every block, the blocks spread over the threads.
    template <typename One>
    void each_block(int num_blocks, int num_rows, const One& one) {
        int per_task = std::clamp(num_blocks / (TASKS_PER_THREAD * pool_.num_threads()), 1, BLOCKS_PER_TASK);
        per_task = std::max(per_task, (num_blocks + MAX_TASKS - 1) / MAX_TASKS);
        pool_.run((num_blocks + per_task - 1) / per_task, [&](int task) {
            Tiles tiles;
            for (int row = 0; row < num_rows; row += ROWS_IN_CACHE)
                for (int block = task * per_task; block < std::min(num_blocks, (task + 1) * per_task); block++)
                    one(block, row, std::min(num_rows, row + ROWS_IN_CACHE), tiles);
        });
    }

    /// 16 channels of a line of `num_out`; the padding of the last block is dropped.
    static void store_channels(float* line, int block, int num_out, Floats sums) {
        int first = block * CHANNELS;
        float all[CHANNELS];
        if (first + CHANNELS <= num_out) return store(line + first, sums);
        store(all, sums);
        std::copy_n(all, num_out - first, line + first);
    }

    static Floats load_channels(const float* line, int block, int num_out) {
        int first = block * CHANNELS;
        float all[CHANNELS] = {};
        if (first + CHANNELS <= num_out) return load(line + first);
        std::copy_n(line + first, num_out - first, all);
        return load(all);
    }

    static void add_channels(float* line, const float* bias, int block, int num_out, Floats sums) {
        if (bias) sums = sums + load_channels(bias, block, num_out);
        store_channels(line, block, num_out, load_channels(line, block, num_out) + sums);
    }

    void make_query_tiles(const Step& step) {
        tiles_.size = needed_tiles_.size = token_tiles_.size = 0;
        int token = 0;
        for (int chunk = 0; chunk < step.num_chunks; chunk++) {
            const int32_t* table = step.block_tables + size_t(step.rows[chunk]) * step.max_blocks;
            int start = step.starts[chunk], length = step.lengths[chunk];
            for (int i = 0; i < length; i += TILE_TOKENS)
                tiles_.add({token + i, std::min(TILE_TOKENS, length - i), start + i, token + i, table});
            for (int i = 0; i < length; i++) token_tiles_.add({token + i, 1, start + i, 0, table});
            token += length;
        }
        for (int i = 0; i < step.num_needed; i++) {
            needed_tiles_.add(token_tiles_.items[step.needed[i]]);
            needed_tiles_.items[i].first_out = i;
        }
    }

    /// Norm, query, key and value; keys and values go into the cache, queries stay in `qkv_`.
    void project_and_store(const Layer& layer, const Step& step) {
        int num_tokens = step.num_tokens, h = model_.hidden_size, D = model_.head_dim, num_heads = model_.num_heads;
        activations_.prepare_for({&layer.query, &layer.key, &layer.value}, num_tokens);
        each_row(num_tokens, [&](int m) {
            rms_norm(residual(m), layer.input_norm, h, model_.norm_eps, activations_.row(m));
            activations_.finish_row(m, h);
        });
        qkv_.make_room(size_t(num_tokens) * qkv_size());
        const int firsts[] = {0, num_heads * D, (num_heads + model_.num_kv_heads) * D};
        multiply({&layer.query, &layer.key, &layer.value}, activations_, num_tokens,
                 [&](int which, int m, int block, Floats sums) {
                     int column = firsts[which] + block * CHANNELS;
                     if (layer.qkv_bias) sums = sums + load(layer.qkv_bias + column);
                     store(qkv_.data() + size_t(m) * qkv_size() + column, sums);
                 });
        each_row(num_tokens, [&](int m) { turn_and_store(layer, step, m); });
    }

    void turn_and_store(const Layer& layer, const Step& step, int m) {
        int D = model_.head_dim, num_turned = model_.num_heads + model_.num_kv_heads;
        float* heads = qkv_.data() + size_t(m) * qkv_size();
        const float *cos = step.cos + size_t(m) * D, *signed_sin = step.signed_sin + size_t(m) * D;
        float query_scale = 1.0f / std::sqrt(float(D));
        for (int head = 0; head < num_turned; head++) {
            bool is_query = head < model_.num_heads;
            const float* norm = is_query ? layer.query_norm : layer.key_norm;
            float* one = heads + size_t(head) * D;
            if (norm) rms_norm(one, norm, D, model_.norm_eps, one);
            rotate_head(one, cos, signed_sin, D, is_query ? query_scale : 1.0f);
        }
        if (step.slots[m] < 0) return;
        const float *keys = heads + size_t(model_.num_heads) * D, *values = keys + size_t(model_.num_kv_heads) * D;
        for (int i = 0; i < model_.num_kv_heads; i++)
            Cache{model_, layer.kv_cache}.write(i, step.slots[m], keys + size_t(i) * D, values + size_t(i) * D);
    }

    /// From here on only these tokens matter: the last layer's keys and values are written.
    void keep_needed_rows(const Step& step) {
        size_t h = model_.hidden_size;
        kept_.make_room(step.num_needed * h);
        for (int i = 0; i < step.num_needed; i++) std::copy_n(residual(int(step.needed[i])), h, kept_.data() + i * h);
        std::copy_n(kept_.data(), step.num_needed * h, residual_.data());
    }

    /// Attention and its output projection, added to the residual.
    void attend(const Layer& layer, const List<QueryTile>& tiles, int num_rows) {
        activations_.prepare_for({&layer.output}, num_rows);
        see_keys({model_, layer.kv_cache}, tiles);
        each_row(num_rows, [&](int m) { activations_.finish_row(m, model_.num_heads * model_.head_dim); });
        multiply({&layer.output}, activations_, num_rows, [&](int, int m, int block, Floats sums) {
            add_channels(residual(m), layer.output_bias, block, model_.hidden_size, sums);
        });
    }

    /// A piece of work is a tile and a KV head; or a segment of that where threads share a tile, put together afterwards.
    void see_keys(const Cache& cache, const List<QueryTile>& tiles) {
        int num_kv_heads = model_.num_kv_heads, group = model_.num_heads / num_kv_heads;
        make_pieces(tiles);
        bool has_shared = pieces_.size > tiles.size * num_kv_heads;
        size_t seen_size = Seen::size(group, model_.head_dim);
        if (has_shared) seen_.make_room(seen_size * pieces_.size);
        auto seen_by = [&](int piece) { return Seen(seen_.data() + seen_size * piece, group, model_.head_dim); };
        each_item(pieces_.size, [&](int i) {
            const Piece& piece = pieces_.items[i];
            Attending one{cache, *piece.tile, piece.kv_head, qkv_.data()};
            if (piece.tile->is_shared())
                one.see_segment(piece.segment, scratch_of_this_thread(), seen_by(i));
            else
                one.write(one.see_all(scratch_of_this_thread()), activations_);
        });
        if (!has_shared) return;
        each_item(tiles.size * num_kv_heads, [&](int item) {
            const QueryTile& tile = tiles.items[item / num_kv_heads];
            if (!tile.is_shared()) return;
            int kv_head = item % num_kv_heads, first = tile.first_piece + kv_head * tile.num_segments();
            for (int i = 1; i < tile.num_segments(); i++)
                for (int row = 0; row < group; row++) put_together(seen_by(first), seen_by(first + i), row, model_.head_dim);
            Attending{cache, tile, kv_head, qkv_.data()}.write(seen_by(first), activations_);
        });
    }

    void make_pieces(const List<QueryTile>& tiles) {
        pieces_.size = 0;
        for (QueryTile& tile : tiles) {
            tile.first_piece = pieces_.size;
            for (int kv_head = 0; kv_head < model_.num_kv_heads; kv_head++)
                for (int segment = 0; segment < tile.num_pieces(); segment++) pieces_.add({&tile, kv_head, segment});
        }
    }

    void feed_forward(const Layer& layer, int num_rows) {
        int h = model_.hidden_size, intermediate = model_.intermediate_size;
        activations_.prepare_for({&layer.gate, &layer.up}, num_rows);
        each_row(num_rows, [&](int m) {
            rms_norm(residual(m), layer.post_norm, h, model_.norm_eps, activations_.row(m));
            activations_.finish_row(m, h);
        });
        between_.prepare_for({&layer.down}, num_rows);
        multiply_gate_and_up(layer, num_rows);
        each_row(num_rows, [&](int m) { between_.finish_row(m, intermediate); });
        multiply({&layer.down}, between_, num_rows, [&](int, int m, int block, Floats sums) {
            add_channels(residual(m), nullptr, block, h, sums);
        });
    }

    /// between = silu(gate) * up, block by block.
    void multiply_gate_and_up(const Layer& layer, int num_rows) {
        each_block(layer.gate.num_blocks(), num_rows, [&](int block, int row, int end_row, Tiles& tiles) {
            float gates[ROWS_IN_CACHE * CHANNELS], ups[ROWS_IN_CACHE * CHANNELS];
            multiply_block(layer.gate, block, activations_, row, end_row, gates, tiles);
            multiply_block(layer.up, block, activations_, row, end_row, ups, tiles);
            for (int m = row; m < end_row; m++) {
                int at = (m - row) * CHANNELS;
                store_channels(between_.row(m), block, model_.intermediate_size, silu(load(gates + at)) * load(ups + at));
            }
        });
    }

    Model model_;
    ThreadPool pool_;
    Buffer<float> residual_, kept_;  // [N, h] the stream that every layer adds to; [num_needed, h] of it
    Buffer<float> qkv_;              // [N, (H + 2K) D]
    Buffer<float> seen_;             // [pieces, K] of `Seen`
    Activations activations_;        // input of the next product, of h or H D values
    Activations between_;            // [M, I] between gate/up and down
    List<QueryTile> tiles_, needed_tiles_, token_tiles_;
    List<Piece> pieces_;
};

}  // namespace

// ------------------------------------------------------------------ 10. the C interface

extern "C" {

const char* nanovllm_instruction_set() { return instruction_set(); }

/// The layers and all that they point to must outlive the decoder.
void* nanovllm_create(const Model* model, int num_threads) { return new Decoder(*model, num_threads); }

/// Each thread stays on a core of its own: cores[0] the caller's while it computes, then one for each other thread. 1 if it could.
int nanovllm_pin(void* decoder, const int32_t* cores) { return static_cast<Decoder*>(decoder)->pool().pin(cores); }

void nanovllm_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

void nanovllm_forward(void* decoder, const Step* step) { static_cast<Decoder*>(decoder)->forward(*step); }

void nanovllm_logits(void* decoder, const float* hidden, int num_rows, float* logits) {
    static_cast<Decoder*>(decoder)->logits(hidden, num_rows, logits);
}

void nanovllm_draw(void* decoder, const Draw* draw) { static_cast<Decoder*>(decoder)->draw(*draw); }

/// y = x W^T, for tests and measurements. x: [num_rows, num_in], y: [num_rows, num_out].
void nanovllm_multiply(void* decoder, const Matrix* matrix, const float* x, int num_rows, float* y) {
    static_cast<Decoder*>(decoder)->multiply_plain(*matrix, x, num_rows, y);
}

void nanovllm_unpack_row(const Matrix* matrix, int row, float* out) { unpack_row(*matrix, row, out); }
}

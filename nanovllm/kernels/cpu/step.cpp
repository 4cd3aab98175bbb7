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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define USE_AVX2 1
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;      // floats in a register
constexpr int CHANNELS = 16;  // output channels in a packed block: two registers
constexpr int QUAD = 4;       // neighbouring inputs that one integer instruction multiplies and adds
constexpr int GROUP = 32;     // inputs that share a scale in the grouped formats
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// ------------------------------------------------------------------ 1. registers
//
// Floats is 8 float32. Ints is 8 int32, one for each of 8 output channels. NibbleSums adds products of 4-bit weights over
// one group: unsigned weight (0..15) times signed activation (-127..127).

#ifdef USE_AVX2

struct Floats { __m256 v; };
struct Ints { __m256i v; };
struct NibbleSums { __m256i v; };  // 16 int16: two for each channel
struct Bytes { __m256i v; };       // 8 channels x QUAD

const char* instruction_set() { return "avx2"; }

inline Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Floats nearest_whole(Floats a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

/// 2 to the power of a, which must hold whole numbers of [-126, 127].
inline Floats power_of_two(Floats a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127)), 23))};
}

inline float sum(Floats a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Floats a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Floats load_bfloat16(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

inline Floats load_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

/// 8 floats of [-127, 127] as the nearest int8.
inline void store_int8(int8_t* p, Floats x) {
    __m256i wide = _mm256_cvtps_epi32(x.v);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline Ints zero_ints() { return {_mm256_setzero_si256()}; }
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))}; }

inline __m256i broadcast_quad(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, QUAD);
    return _mm256_set1_epi32(quad);
}

/// sums[channel] += w[channel, 0..3] . x[0..3], all signed. vpmaddubsw wants one side unsigned, so the sign of w moves to x;
/// two products fit into its int16: at most 2 * 128 * 127.
inline Ints add_dot(Ints sums, Bytes w, const int8_t* x) {
    __m256i signed_x = _mm256_sign_epi8(broadcast_quad(x), w.v);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v), signed_x);
    return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

inline NibbleSums zero_nibble_sums() { return {_mm256_setzero_si256()}; }

/// Eight of these fit into int16, one group: 8 * 2 * 15 * 127 = 30,480.
inline NibbleSums add_dot(NibbleSums sums, Bytes w, const int8_t* x) {
    return {_mm256_add_epi16(sums.v, _mm256_maddubs_epi16(w.v, broadcast_quad(x)))};
}

inline Floats to_floats(NibbleSums a) { return {_mm256_cvtepi32_ps(_mm256_madd_epi16(a.v, _mm256_set1_epi16(1)))}; }

inline void pause_briefly() { _mm_pause(); }

#else

struct Floats { float v[LANES]; };
struct Ints { int32_t v[LANES]; };
struct NibbleSums { int32_t v[LANES]; };
struct Bytes { uint8_t v[LANES * QUAD]; };

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
inline Floats load_bfloat16(const uint16_t* p) { return each([&](int i) { return bits_to_float(uint32_t(p[i]) << 16); }); }
inline Floats load_half(const uint16_t* p) { return each([&](int i) { return half_to_float(p[i]); }); }

inline void store_int8(int8_t* p, Floats x) {
    for (int i = 0; i < LANES; i++) p[i] = std::isnan(x.v[i]) ? -128 : int8_t(std::nearbyint(x.v[i]));
}

inline Ints zero_ints() { return {}; }
inline Floats to_floats(Ints a) { return each([&](int i) { return float(a.v[i]); }); }

inline Bytes load_bytes(const uint8_t* p) {
    Bytes result;
    std::copy_n(p, LANES * QUAD, result.v);
    return result;
}

inline Bytes low_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte &= 15;
    return a;
}

inline Bytes high_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte >>= 4;
    return a;
}

inline Ints add_dot(Ints sums, const Bytes& w, const int8_t* x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < QUAD; j++) sums.v[i] += int8_t(w.v[i * QUAD + j]) * x[j];
    return sums;
}

inline NibbleSums zero_nibble_sums() { return {}; }

inline NibbleSums add_dot(NibbleSums sums, const Bytes& w, const int8_t* x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < QUAD; j++) sums.v[i] += w.v[i * QUAD + j] * x[j];
    return sums;
}

inline Floats to_floats(NibbleSums a) { return each([&](int i) { return float(a.v[i]); }); }
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

inline Floats silu(Floats x) { return x / (broadcast(1.0f) + exponential(broadcast(0.0f) - x)); }

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// ------------------------------------------------------------------ 2. threads

/// Runs numbered tasks on the caller's thread and the workers. A task goes to whoever comes first, and the caller waits for
/// tasks, not for threads: a worker that the system has put aside delays nobody unless it holds a task.
class ThreadPool {
  public:
    explicit ThreadPool(int num_threads) {
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { work(); });
    }

    ~ThreadPool() {
        is_closing_.store(true);
        publish(0);
        for (std::thread& worker : workers_) worker.join();
    }

    int num_threads() const { return int(workers_.size()) + 1; }

    void run(int num_tasks, const std::function<void(int)>& task) {
        if (workers_.empty() || num_tasks <= 1) {
            for (int i = 0; i < num_tasks; i++) task(i);
            return;
        }
        task_ = &task;
        num_done_.store(0, std::memory_order_relaxed);
        publish(num_tasks);
        while (take_one()) {
        }
        for (int turn = 0; num_done_.load(std::memory_order_acquire) < num_tasks; turn++) wait_a_moment(turn);
    }

  private:
    static constexpr int SPINS = 2000;   // some 20 to 50 microseconds
    static constexpr int YIELDS = 50;    // then the core is offered to others, then the thread sleeps

    // `ticket_` is generation << 32 | tasks << 16 | next task. A claim is a compare-and-swap of the whole word, so a thread
    // that slept through a generation cannot claim a task of another. It reads `task_` only after its claim, and the caller
    // does not replace `task_` before every claimed task is done.
    void publish(int num_tasks) {
        uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(generation << 32 | uint64_t(num_tasks) << 16, std::memory_order_release);
        ticket_.notify_all();
    }

    static bool has_task(uint64_t ticket) { return (ticket & 0xffff) < (ticket >> 16 & 0xffff); }

    bool take_one() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (has_task(ticket)) {
            if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
                (*task_)(int(ticket & 0xffff));
                num_done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
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
            } else if (!is_closing_.load()) {
                ticket_.wait(ticket);  // a futex
                turn = 0;
            }
        }
    }

    static void wait_a_moment(int turn) {
        if (turn < SPINS)
            pause_briefly();
        else
            sched_yield();
    }

    std::vector<std::thread> workers_;
    const std::function<void(int)>* task_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> num_done_{0};
    std::atomic<bool> is_closing_{false};
};

constexpr int MAX_TASKS = 0xffff;

// ------------------------------------------------------------------ 3. what Python hands over (library.py has the same)

enum Kind : int32_t {
    BFLOAT16 = 0,      // values [out/16][in][16] bfloat16
    INT8_CHANNEL = 1,  // values [out/16][in/4][16][4] int8; scales [out] float32
    INT8_GROUP = 2,    // the same values; scales [out/16][in/32][16] float16
    INT4_GROUP = 3,    // values [out/16][in/32][4][16][4] bytes: low nibble of byte i of quad p is input 4p + i of the group,
                       // high nibble input 16 + 4p + i; value = scale * nibble + minimum, both [out/16][in/32][16] float16
};

struct Matrix {
    int32_t kind, num_out, num_in, padded_in;  // num_out is what was asked for; the blocks hold it padded
    const uint8_t* values;
    const void* scales;
    const uint16_t* minimums;

    int num_blocks() const { return (num_out + CHANNELS - 1) / CHANNELS; }
    int num_groups() const { return padded_in / GROUP; }
};

struct Layer {
    Matrix query, key, value, output, gate, up, down;
    const float *input_norm, *post_norm;    // [h]
    const float *qkv_bias, *output_bias;    // [(H + 2K) D], [h]; null where the family has none
    const float *query_norm, *key_norm;     // [D]; null where the family has none
    void* kv_cache;                         // [2][K][blocks][block_size][D]
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

/// int8 values of one scale per `width` inputs; `weighted_sums` is scale * sum of a group, for formats with a minimum.
struct Quantized {
    std::vector<int8_t> values;       // [M, padded_in]
    std::vector<float> scales;        // [M, num_groups]; by row: the first of each
    std::vector<float> weighted_sums;

    void reserve(size_t num_rows, size_t padded_in) {
        if (values.size() < num_rows * padded_in) values.resize(num_rows * padded_in);
        if (scales.size() < num_rows * padded_in / GROUP) scales.resize(num_rows * padded_in / GROUP);
        weighted_sums.resize(scales.size());
    }
};

/// M rows of activations in every form that the coming matrices read: float32 for bfloat16 weights, int8 for integers.
struct Activations {
    int padded_in = 0;
    bool wants_floats = false, wants_rows = false, wants_groups = false;
    std::vector<float> floats;  // [M, padded_in], always filled first
    Quantized by_row, by_group;

    void prepare_for(std::initializer_list<const Matrix*> matrices, int num_rows) {
        wants_floats = wants_rows = wants_groups = false;
        for (const Matrix* matrix : matrices) {
            padded_in = matrix->padded_in;
            wants_floats |= matrix->kind == BFLOAT16;
            wants_rows |= matrix->kind == INT8_CHANNEL;
            wants_groups |= matrix->kind == INT8_GROUP || matrix->kind == INT4_GROUP;
        }
        size_t size = size_t(num_rows) * padded_in;
        if (floats.size() < size) floats.resize(size);
        if (wants_rows) by_row.reserve(num_rows, padded_in);
        if (wants_groups) by_group.reserve(num_rows, padded_in);
    }

    float* row(int m) { return floats.data() + size_t(m) * padded_in; }

    /// Call when `row(m)` holds `num_in` values.
    void finish_row(int m, int num_in) {
        std::fill(row(m) + num_in, row(m) + padded_in, 0.0f);
        if (wants_rows) quantize_row(m, padded_in, by_row);
        if (wants_groups) quantize_row(m, GROUP, by_group);
    }

  private:
    void quantize_row(int m, int width, Quantized& out) {
        const float* x = row(m);
        int8_t* q = out.values.data() + size_t(m) * padded_in;
        size_t first_group = size_t(m) * (padded_in / GROUP);
        for (int start = 0; start < padded_in; start += width) {
            Floats most = broadcast(0.0f), zero = broadcast(0.0f), bad = zero;  // bad: NaN if any value is not finite, else 0
            for (int i = start; i < start + width; i += LANES) {
                Floats part = load(x + i);
                most = larger(most, absolute(part));
                bad = fma(part, zero, bad);
            }
            float peak = largest(most), scale = peak / 127.0f + sum(bad);  // an integer cannot be NaN, its scale can
            Floats inverse = broadcast(peak > 0 ? 127.0f / peak : 0.0f), total = broadcast(0.0f);
            for (int i = start; i < start + width; i += LANES) {
                Floats scaled = nearest_whole(smaller(larger(load(x + i) * inverse, broadcast(-127.0f)), broadcast(127.0f)));
                store_int8(q + i, scaled);
                total = total + scaled;
            }
            out.scales[first_group + start / width] = scale;
            out.weighted_sums[first_group + start / width] = scale * sum(total);
        }
    }
};

// ------------------------------------------------------------------ 5. products
//
// A tile is R rows by one block of 16 channels: `low` and `high` hold 8 channels each. Weights are read once for R rows.

template <int R>
struct Tile {
    Floats low[R], high[R];
};

template <int R>
Tile<R> multiply_bfloat16(const Matrix& w, int block, Activations& x, int first_row) {
    Tile<R> tile;
    for (int r = 0; r < R; r++) tile.low[r] = tile.high[r] = broadcast(0.0f);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(w.values) + size_t(block) * w.padded_in * CHANNELS;
    const float* rows = x.row(first_row);
    for (int i = 0; i < w.padded_in; i++, values += CHANNELS) {
        Floats low = load_bfloat16(values), high = load_bfloat16(values + LANES);
        for (int r = 0; r < R; r++) {
            Floats input = broadcast(rows[size_t(r) * w.padded_in + i]);
            tile.low[r] = fma(low, input, tile.low[r]);
            tile.high[r] = fma(high, input, tile.high[r]);
        }
    }
    return tile;
}

/// Adds the products of `num_quads` quads to the sums. values: [num_quads][16][4], x: rows `stride` apart.
template <int R>
inline void add_quads(Ints (&low)[R], Ints (&high)[R], const uint8_t* values, const int8_t* x, size_t stride, int num_quads) {
    for (int quad = 0; quad < num_quads; quad++, values += CHANNELS * QUAD, x += QUAD) {
        Bytes weights_low = load_bytes(values), weights_high = load_bytes(values + LANES * QUAD);
        for (int r = 0; r < R; r++) {
            low[r] = add_dot(low[r], weights_low, x + r * stride);
            high[r] = add_dot(high[r], weights_high, x + r * stride);
        }
    }
}

template <int R>
Tile<R> multiply_int8_channel(const Matrix& w, int block, const Activations& x, int first_row) {
    Ints low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = zero_ints();
    const uint8_t* values = w.values + size_t(block) * w.padded_in * CHANNELS;
    const int8_t* rows = x.by_row.values.data() + size_t(first_row) * w.padded_in;
    add_quads<R>(low, high, values, rows, w.padded_in, w.padded_in / QUAD);
    const float* scales = static_cast<const float*>(w.scales) + size_t(block) * CHANNELS;
    Tile<R> tile;
    for (int r = 0; r < R; r++) {
        Floats row_scale = broadcast(x.by_row.scales[size_t(first_row + r) * w.num_groups()]);
        tile.low[r] = to_floats(low[r]) * (load(scales) * row_scale);
        tile.high[r] = to_floats(high[r]) * (load(scales + LANES) * row_scale);
    }
    return tile;
}

template <int R>
Tile<R> multiply_int8_group(const Matrix& w, int block, const Activations& x, int first_row) {
    Tile<R> tile;
    for (int r = 0; r < R; r++) tile.low[r] = tile.high[r] = broadcast(0.0f);
    int num_groups = w.num_groups();
    const uint8_t* values = w.values + size_t(block) * w.padded_in * CHANNELS;
    const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + size_t(block) * num_groups * CHANNELS;
    const int8_t* rows = x.by_group.values.data() + size_t(first_row) * w.padded_in;
    const float* row_scales = x.by_group.scales.data() + size_t(first_row) * num_groups;
    for (int g = 0; g < num_groups; g++, scales += CHANNELS) {
        Ints low[R], high[R];
        for (int r = 0; r < R; r++) low[r] = high[r] = zero_ints();
        add_quads<R>(low, high, values + size_t(g) * GROUP * CHANNELS, rows + g * GROUP, w.padded_in, GROUP / QUAD);
        Floats scale_low = load_half(scales), scale_high = load_half(scales + LANES);
        for (int r = 0; r < R; r++) {
            Floats row_scale = broadcast(row_scales[size_t(r) * num_groups + g]);
            tile.low[r] = fma(to_floats(low[r]), scale_low * row_scale, tile.low[r]);
            tile.high[r] = fma(to_floats(high[r]), scale_high * row_scale, tile.high[r]);
        }
    }
    return tile;
}

/// sum of (scale * nibble + minimum) * x = scale * (nibbles . x) + minimum * (sum of x), group by group.
template <int R>
Tile<R> multiply_int4_group(const Matrix& w, int block, const Activations& x, int first_row) {
    constexpr int PAIRS = GROUP / QUAD / 2;                // a byte holds quads p and p + 4 of its group
    constexpr int GROUP_BYTES = GROUP * CHANNELS / 2;
    Tile<R> tile;
    for (int r = 0; r < R; r++) tile.low[r] = tile.high[r] = broadcast(0.0f);
    int num_groups = w.num_groups();
    const uint8_t* values = w.values + size_t(block) * num_groups * GROUP_BYTES;
    size_t first_scale = size_t(block) * num_groups * CHANNELS;
    const uint16_t *scales = static_cast<const uint16_t*>(w.scales) + first_scale, *minimums = w.minimums + first_scale;
    const int8_t* rows = x.by_group.values.data() + size_t(first_row) * w.padded_in;
    const float* row_scales = x.by_group.scales.data() + size_t(first_row) * num_groups;
    const float* row_sums = x.by_group.weighted_sums.data() + size_t(first_row) * num_groups;
    for (int g = 0; g < num_groups; g++, scales += CHANNELS, minimums += CHANNELS) {
        NibbleSums low[R], high[R];
        for (int r = 0; r < R; r++) low[r] = high[r] = zero_nibble_sums();
        for (int pair = 0; pair < PAIRS; pair++, values += CHANNELS * QUAD) {
            Bytes bytes_low = load_bytes(values), bytes_high = load_bytes(values + LANES * QUAD);
            Bytes near_low = low_nibbles(bytes_low), far_low = high_nibbles(bytes_low);
            Bytes near_high = low_nibbles(bytes_high), far_high = high_nibbles(bytes_high);
            for (int r = 0; r < R; r++) {
                const int8_t* near = rows + size_t(r) * w.padded_in + g * GROUP + pair * QUAD;
                low[r] = add_dot(add_dot(low[r], near_low, near), far_low, near + GROUP / 2);
                high[r] = add_dot(add_dot(high[r], near_high, near), far_high, near + GROUP / 2);
            }
        }
        Floats scale_low = load_half(scales), scale_high = load_half(scales + LANES);
        Floats minimum_low = load_half(minimums), minimum_high = load_half(minimums + LANES);
        for (int r = 0; r < R; r++) {
            Floats row_scale = broadcast(row_scales[size_t(r) * num_groups + g]);
            Floats row_sum = broadcast(row_sums[size_t(r) * num_groups + g]);
            tile.low[r] = fma(minimum_low, row_sum, fma(to_floats(low[r]), scale_low * row_scale, tile.low[r]));
            tile.high[r] = fma(minimum_high, row_sum, fma(to_floats(high[r]), scale_high * row_scale, tile.high[r]));
        }
    }
    return tile;
}

template <int R>
Tile<R> multiply_tile(const Matrix& w, int block, Activations& x, int first_row) {
    switch (w.kind) {
        case BFLOAT16: return multiply_bfloat16<R>(w, block, x, first_row);
        case INT8_CHANNEL: return multiply_int8_channel<R>(w, block, x, first_row);
        case INT8_GROUP: return multiply_int8_group<R>(w, block, x, first_row);
        default: return multiply_int4_group<R>(w, block, x, first_row);
    }
}

/// What becomes of 16 channels of one row: (row, block, low, high).
using Finish = std::function<void(int, int, Floats, Floats)>;

template <int R>
void multiply_rows(const Matrix& w, int block, Activations& x, int first_row, const Finish& finish) {
    Tile<R> tile = multiply_tile<R>(w, block, x, first_row);
    for (int r = 0; r < R; r++) finish(first_row + r, block, tile.low[r], tile.high[r]);
}

void multiply_block(const Matrix& w, int block, Activations& x, int first_row, int end_row, const Finish& finish) {
    int row = first_row;
    for (; row + 4 <= end_row; row += 4) multiply_rows<4>(w, block, x, row, finish);
    if (end_row - row == 3) multiply_rows<3>(w, block, x, row, finish);
    if (end_row - row == 2) multiply_rows<2>(w, block, x, row, finish);
    if (end_row - row == 1) multiply_rows<1>(w, block, x, row, finish);
}

// ------------------------------------------------------------------ 6. attention

/// Consecutive tokens of one chunk. A row attends to the keys [0, first_position + its place in the tile].
struct QueryTile {
    int first_token, num_tokens, first_position, first_out;  // first_out: line of the result
    const int32_t* block_table;
};

constexpr int TILE_TOKENS = 8;
constexpr int TILE_KEYS = 32;

/// Scratch of one (tile, KV head): keys and values as floats, and per row the running softmax.
struct AttentionScratch {
    std::vector<float> keys, values, mixed, peaks, totals;

    void reset(int num_rows, int head_dim) {
        keys.resize(size_t(TILE_KEYS) * head_dim);
        values.resize(size_t(TILE_KEYS) * head_dim);
        mixed.assign(size_t(num_rows) * head_dim, 0.0f);
        peaks.assign(num_rows, LOWEST);
        totals.assign(num_rows, 0.0f);
    }
};

/// scores[j] = query . keys[j], four keys at a time; all of TILE_KEYS, those from `num_keys` on become minus infinity.
void score_keys(const float* query, const float* keys, int head_dim, int num_keys, float* scores) {
    for (int j = 0; j < TILE_KEYS; j += 4) {
        Floats sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
        if (j < num_keys)
            for (int d = 0; d < head_dim; d += LANES) {
                Floats part = load(query + d);
                for (int i = 0; i < 4; i++) sums[i] = fma(part, load(keys + size_t(j + i) * head_dim + d), sums[i]);
            }
        for (int i = 0; i < 4; i++) scores[j + i] = j + i < num_keys ? sum(sums[i]) : LOWEST;
    }
}

/// mixed = mixed * decay + sum of weights[j] * values[j], for NUM_REGISTERS * 8 dimensions.
template <int NUM_REGISTERS>
inline void mix_values(const float* weights, const float* values, int head_dim, int num_keys, float decay, float* mixed) {
    Floats sums[NUM_REGISTERS];
    for (int i = 0; i < NUM_REGISTERS; i++) sums[i] = load(mixed + i * LANES) * broadcast(decay);
    for (int j = 0; j < num_keys; j++) {
        Floats weight = broadcast(weights[j]);
        for (int i = 0; i < NUM_REGISTERS; i++) sums[i] = fma(weight, load(values + size_t(j) * head_dim + i * LANES), sums[i]);
    }
    for (int i = 0; i < NUM_REGISTERS; i++) store(mixed + i * LANES, sums[i]);
}

/// One row sees `num_keys` more keys: softmax over all so far, without having kept the earlier scores (online softmax).
void attend_keys(const float* query, AttentionScratch& scratch, int row, int head_dim, int num_keys) {
    float scores[TILE_KEYS];
    score_keys(query, scratch.keys.data(), head_dim, num_keys, scores);
    Floats most = load(scores);
    for (int j = LANES; j < TILE_KEYS; j += LANES) most = larger(most, load(scores + j));
    float peak = std::max(scratch.peaks[row], largest(most)), decays[LANES];
    store(decays, exponential(broadcast(scratch.peaks[row] - peak)));
    Floats total = broadcast(0.0f);
    for (int j = 0; j < TILE_KEYS; j += LANES) {
        Floats weight = exponential(load(scores + j) - broadcast(peak));
        store(scores + j, weight);
    }
    std::fill(scores + num_keys, scores + TILE_KEYS, 0.0f);
    for (int j = 0; j < TILE_KEYS; j += LANES) total = total + load(scores + j);
    scratch.totals[row] = scratch.totals[row] * decays[0] + sum(total);
    scratch.peaks[row] = peak;
    float* mixed = scratch.mixed.data() + size_t(row) * head_dim;
    int d = 0;
    for (; d + 8 * LANES <= head_dim; d += 8 * LANES)
        mix_values<8>(scores, scratch.values.data() + d, head_dim, num_keys, decays[0], mixed + d);
    for (; d < head_dim; d += 2 * LANES)
        mix_values<2>(scores, scratch.values.data() + d, head_dim, num_keys, decays[0], mixed + d);
}

/// `num_values` values of the cache as floats.
void read_cache(const Model& model, const void* cache, size_t offset, float* out, int num_values) {
    if (model.kv_is_bfloat16)
        for (int i = 0; i < num_values; i += LANES)
            store(out + i, load_bfloat16(static_cast<const uint16_t*>(cache) + offset + i));
    else
        std::copy_n(static_cast<const float*>(cache) + offset, num_values, out);
}

void write_cache(const Model& model, void* cache, size_t offset, const float* x, int num_values) {
    if (model.kv_is_bfloat16)
        std::transform(x, x + num_values, static_cast<uint16_t*>(cache) + offset, to_bfloat16);
    else
        std::copy_n(x, num_values, static_cast<float*>(cache) + offset);
}

/// Where a slot's key (which = 0) or value (1) of a head begins in the cache.
size_t cache_offset(const Model& model, int which, int kv_head, int64_t slot) {
    size_t num_slots = size_t(model.num_blocks) * model.block_size;
    return ((size_t(which) * model.num_kv_heads + kv_head) * num_slots + size_t(slot)) * model.head_dim;
}

/// qkv: [N, (H + 2K) D], queries turned and scaled; out: lines of H D, padded_out apart.
void attend_tile(const Model& model, const void* cache, const QueryTile& tile, int kv_head, const float* qkv, Activations& out) {
    thread_local AttentionScratch scratch;
    int D = model.head_dim, group = model.num_heads / model.num_kv_heads, qkv_size = (model.num_heads + 2 * model.num_kv_heads) * D;
    scratch.reset(tile.num_tokens * group, D);
    int end = tile.first_position + tile.num_tokens;
    for (int first_key = 0; first_key < end; first_key += TILE_KEYS) {
        int num_loaded = std::min(TILE_KEYS, end - first_key);
        for (int j = 0; j < num_loaded; j++) {
            int position = first_key + j;
            int64_t slot = int64_t(tile.block_table[position / model.block_size]) * model.block_size + position % model.block_size;
            read_cache(model, cache, cache_offset(model, 0, kv_head, slot), scratch.keys.data() + size_t(j) * D, D);
            read_cache(model, cache, cache_offset(model, 1, kv_head, slot), scratch.values.data() + size_t(j) * D, D);
        }
        std::fill(scratch.keys.begin() + size_t(num_loaded) * D, scratch.keys.end(), 0.0f);
        for (int t = 0; t < tile.num_tokens; t++) {
            int num_keys = std::min(num_loaded, tile.first_position + t + 1 - first_key);
            if (num_keys <= 0) continue;
            const float* query = qkv + size_t(tile.first_token + t) * qkv_size + size_t(kv_head) * group * D;
            for (int g = 0; g < group; g++) attend_keys(query + size_t(g) * D, scratch, t * group + g, D, num_keys);
        }
    }
    for (int row = 0; row < tile.num_tokens * group; row++) {
        float* line = out.row(tile.first_out + row / group) + (size_t(kv_head) * group + row % group) * D;
        Floats inverse = broadcast(1.0f / scratch.totals[row]);
        for (int d = 0; d < D; d += LANES) store(line + d, load(scratch.mixed.data() + size_t(row) * D + d) * inverse);
    }
}

// ------------------------------------------------------------------ 7. rows: norms, rotary, embedding

/// out = x / sqrt(mean(x^2) + eps) * weight. Sizes that are no multiple of 8 end with single values.
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

/// Dimension i turns with dimension i + D/2; the result is multiplied by `factor`.
void rotate_head(float* head, const float* cos, const float* signed_sin, int head_dim, float factor) {
    int half = head_dim / 2;
    for (int i = 0; i < half; i += LANES) {
        Floats a = load(head + i), b = load(head + half + i), scale = broadcast(factor);
        store(head + i, fma(a, load(cos + i), b * load(signed_sin + i)) * scale);
        store(head + half + i, fma(b, load(cos + half + i), a * load(signed_sin + half + i)) * scale);
    }
}

/// One row of a packed matrix, as floats: how the embedding is looked up, also in a table that is the output head too.
void unpack_row(const Matrix& w, int row, float* out) {
    int block = row / CHANNELS, channel = row % CHANNELS;
    size_t group_stride = size_t(CHANNELS), first_group = size_t(block) * w.num_groups() * CHANNELS + channel;
    auto half_at = [&](const void* halves, int group) {
        float eight[LANES];
        const uint16_t* p = static_cast<const uint16_t*>(halves) + first_group + group * group_stride - channel % LANES;
        store(eight, load_half(p));
        return eight[channel % LANES];
    };
    for (int i = 0; i < w.num_in; i++) {
        int group = i / GROUP, within = i % GROUP;
        size_t quad = (size_t(block) * (w.padded_in / QUAD) + i / QUAD) * CHANNELS + channel;
        if (w.kind == BFLOAT16) {
            uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(w.values)[(size_t(block) * w.padded_in + i) * CHANNELS + channel]) << 16;
            std::memcpy(out + i, &bits, 4);
        } else if (w.kind == INT8_CHANNEL) {
            out[i] = float(int8_t(w.values[quad * QUAD + i % QUAD])) * static_cast<const float*>(w.scales)[row];
        } else if (w.kind == INT8_GROUP) {
            out[i] = float(int8_t(w.values[quad * QUAD + i % QUAD])) * half_at(w.scales, group);
        } else {
            size_t pair = (size_t(block) * w.num_groups() + group) * (GROUP / QUAD / 2) + within % (GROUP / 2) / QUAD;
            int byte = w.values[(pair * CHANNELS + channel) * QUAD + i % QUAD];
            out[i] = float(within < GROUP / 2 ? byte & 15 : byte >> 4) * half_at(w.scales, group) + half_at(w.minimums, group);
        }
    }
}

// ------------------------------------------------------------------ 8. the step

class Decoder {
  public:
    Decoder(const Model& model, int num_threads) : model_(model), pool_(num_threads) {}

    void forward(const Step& step) {
        int num_tokens = step.num_tokens, h = model_.hidden_size;
        make_query_tiles(step);
        residual_.resize(std::max(residual_.size(), size_t(num_tokens) * h));
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

    /// hidden: [M, h] -> logits: [M, V].
    void logits(const float* hidden, int num_rows, float* out) {
        activations_.prepare_for({&model_.head}, num_rows);
        each_row(num_rows, [&](int m) {
            std::copy_n(hidden + size_t(m) * model_.hidden_size, model_.hidden_size, activations_.row(m));
            activations_.finish_row(m, model_.hidden_size);
        });
        multiply({&model_.head}, activations_, num_rows, [&](int, int m, int block, Floats low, Floats high) {
            store_channels(out + size_t(m) * model_.head.num_out, block, model_.head.num_out, low, high);
        });
    }

    void multiply_plain(const Matrix& w, const float* x, int num_rows, float* out) {
        activations_.prepare_for({&w}, num_rows);
        each_row(num_rows, [&](int m) {
            std::copy_n(x + size_t(m) * w.num_in, w.num_in, activations_.row(m));
            activations_.finish_row(m, w.num_in);
        });
        multiply({&w}, activations_, num_rows, [&](int, int m, int block, Floats low, Floats high) {
            store_channels(out + size_t(m) * w.num_out, block, w.num_out, low, high);
        });
    }

  private:
    static constexpr int ROWS_PER_TASK = 16;    // of the work that is a few microseconds a row
    static constexpr int BLOCKS_PER_TASK = 4;   // 64 output channels
    static constexpr int ROWS_IN_CACHE = 64;    // their activations stay near while a task's blocks pass

    float* residual(int m) { return residual_.data() + size_t(m) * model_.hidden_size; }
    int qkv_size() const { return (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim; }

    void each_row(int num_rows, const std::function<void(int)>& row) {
        pool_.run((num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](int task) {
            for (int m = task * ROWS_PER_TASK; m < std::min(num_rows, (task + 1) * ROWS_PER_TASK); m++) row(m);
        });
    }

    /// Several matrices of the same input, as if they were one above the other. finish: (which matrix, row, block, low, high).
    template <typename FinishOne>
    void multiply(std::initializer_list<const Matrix*> matrices, Activations& x, int num_rows, FinishOne finish) {
        int num_blocks = 0;
        for (const Matrix* matrix : matrices) num_blocks += matrix->num_blocks();
        each_range_of_blocks(num_blocks, [&](int first, int end) {
            for (int row = 0; row < num_rows; row += ROWS_IN_CACHE)
                for (int block = first; block < end; block++) {
                    int which = 0, local = block;
                    while (local >= matrices.begin()[which]->num_blocks()) local -= matrices.begin()[which++]->num_blocks();
                    Finish one = [&](int m, int b, Floats low, Floats high) { finish(which, m, b, low, high); };
                    multiply_block(*matrices.begin()[which], local, x, row, std::min(num_rows, row + ROWS_IN_CACHE), one);
                }
        });
    }

    void each_range_of_blocks(int num_blocks, const std::function<void(int, int)>& range) {
        int per_task = std::max(BLOCKS_PER_TASK, (num_blocks + MAX_TASKS - 1) / MAX_TASKS);
        pool_.run((num_blocks + per_task - 1) / per_task,
                  [&](int task) { range(task * per_task, std::min(num_blocks, (task + 1) * per_task)); });
    }

    /// 16 channels of a line of `num_out`; the padding of the last block is dropped.
    static void store_channels(float* line, int block, int num_out, Floats low, Floats high) {
        int first = block * CHANNELS;
        if (first + CHANNELS <= num_out) {
            store(line + first, low);
            store(line + first + LANES, high);
        } else {
            float both[CHANNELS];
            store(both, low);
            store(both + LANES, high);
            std::copy_n(both, num_out - first, line + first);
        }
    }

    static void add_channels(float* line, const float* bias, int block, int num_out, Floats low, Floats high) {
        float both[CHANNELS];
        store(both, low);
        store(both + LANES, high);
        int first = block * CHANNELS, count = std::min(CHANNELS, num_out - first);
        for (int i = 0; i < count; i++) line[first + i] += both[i] + (bias ? bias[first + i] : 0.0f);
    }

    void make_query_tiles(const Step& step) {
        tiles_.clear();
        needed_tiles_.clear();
        std::vector<QueryTile> token_tiles;  // of one token each
        int token = 0;
        for (int chunk = 0; chunk < step.num_chunks; chunk++) {
            const int32_t* table = step.block_tables + size_t(step.rows[chunk]) * step.max_blocks;
            int start = step.starts[chunk], length = step.lengths[chunk];
            for (int i = 0; i < length; i += TILE_TOKENS)
                tiles_.push_back({token + i, std::min(TILE_TOKENS, length - i), start + i, token + i, table});
            for (int i = 0; i < length; i++) token_tiles.push_back({token + i, 1, start + i, 0, table});
            token += length;
        }
        for (int i = 0; i < step.num_needed; i++) {
            needed_tiles_.push_back(token_tiles[step.needed[i]]);
            needed_tiles_.back().first_out = i;
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
        qkv_.resize(std::max(qkv_.size(), size_t(num_tokens) * qkv_size()));
        const int firsts[] = {0, num_heads * D, (num_heads + model_.num_kv_heads) * D};
        multiply({&layer.query, &layer.key, &layer.value}, activations_, num_tokens,
                 [&](int which, int m, int block, Floats low, Floats high) {
                     int column = firsts[which] + block * CHANNELS;
                     if (layer.qkv_bias) {
                         low = low + load(layer.qkv_bias + column);
                         high = high + load(layer.qkv_bias + column + LANES);
                     }
                     float* place = qkv_.data() + size_t(m) * qkv_size() + column;
                     store(place, low);
                     store(place + LANES, high);
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
        for (int which = 0; which < 2; which++)
            for (int kv_head = 0; kv_head < model_.num_kv_heads; kv_head++) {
                const float* one = heads + size_t(model_.num_heads + which * model_.num_kv_heads + kv_head) * D;
                write_cache(model_, layer.kv_cache, cache_offset(model_, which, kv_head, step.slots[m]), one, D);
            }
    }

    /// From here on only these tokens matter: the last layer's keys and values are written.
    void keep_needed_rows(const Step& step) {
        std::vector<float> kept(size_t(step.num_needed) * model_.hidden_size);
        for (int i = 0; i < step.num_needed; i++)
            std::copy_n(residual(int(step.needed[i])), model_.hidden_size, kept.data() + size_t(i) * model_.hidden_size);
        std::copy(kept.begin(), kept.end(), residual_.begin());
    }

    /// Attention and its output projection, added to the residual.
    void attend(const Layer& layer, const std::vector<QueryTile>& tiles, int num_rows) {
        activations_.prepare_for({&layer.output}, num_rows);
        int num_items = int(tiles.size()) * model_.num_kv_heads, per_task = (num_items + MAX_TASKS - 1) / MAX_TASKS;
        pool_.run((num_items + per_task - 1) / per_task, [&](int task) {
            for (int item = task * per_task; item < std::min(num_items, (task + 1) * per_task); item++) {
                const QueryTile& tile = tiles[item / model_.num_kv_heads];
                attend_tile(model_, layer.kv_cache, tile, item % model_.num_kv_heads, qkv_.data(), activations_);
            }
        });
        each_row(num_rows, [&](int m) { activations_.finish_row(m, model_.num_heads * model_.head_dim); });
        multiply({&layer.output}, activations_, num_rows, [&](int, int m, int block, Floats low, Floats high) {
            add_channels(residual(m), layer.output_bias, block, model_.hidden_size, low, high);
        });
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
        multiply({&layer.down}, between_, num_rows, [&](int, int m, int block, Floats low, Floats high) {
            add_channels(residual(m), nullptr, block, h, low, high);
        });
    }

    /// between = silu(gate) * up. A block of gates waits in a small buffer for the same block of ups.
    void multiply_gate_and_up(const Layer& layer, int num_rows) {
        each_range_of_blocks(layer.gate.num_blocks(), [&](int first, int end) {
            float gates[ROWS_IN_CACHE * CHANNELS];
            for (int row = 0; row < num_rows; row += ROWS_IN_CACHE)
                for (int block = first; block < end; block++) {
                    int end_row = std::min(num_rows, row + ROWS_IN_CACHE);
                    multiply_block(layer.gate, block, activations_, row, end_row, [&](int m, int, Floats low, Floats high) {
                        store(gates + (m - row) * CHANNELS, low);
                        store(gates + (m - row) * CHANNELS + LANES, high);
                    });
                    multiply_block(layer.up, block, activations_, row, end_row, [&](int m, int, Floats low, Floats high) {
                        const float* gate = gates + (m - row) * CHANNELS;
                        store_channels(between_.row(m), block, model_.intermediate_size, silu(load(gate)) * low,
                                       silu(load(gate + LANES)) * high);
                    });
                }
        });
    }

    Model model_;
    ThreadPool pool_;
    std::vector<float> residual_;  // [N, h] the stream that every layer adds to
    std::vector<float> qkv_;       // [N, (H + 2K) D]
    Activations activations_;      // input of the next product, of h or H D values
    Activations between_;          // [M, I] between gate/up and down
    std::vector<QueryTile> tiles_, needed_tiles_;
};

}  // namespace

// ------------------------------------------------------------------ 9. the C interface

extern "C" {

const char* nanovllm_instruction_set() { return instruction_set(); }

/// The layers and all that they point to must outlive the decoder.
void* nanovllm_create(const Model* model, int num_threads) { return new Decoder(*model, num_threads); }

void nanovllm_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

void nanovllm_forward(void* decoder, const Step* step) { static_cast<Decoder*>(decoder)->forward(*step); }

void nanovllm_logits(void* decoder, const float* hidden, int num_rows, float* logits) {
    static_cast<Decoder*>(decoder)->logits(hidden, num_rows, logits);
}

/// y = x W^T, for tests and measurements. x: [num_rows, num_in], y: [num_rows, num_out].
void nanovllm_multiply(void* decoder, const Matrix* matrix, const float* x, int num_rows, float* y) {
    static_cast<Decoder*>(decoder)->multiply_plain(*matrix, x, num_rows, y);
}

void nanovllm_unpack_row(const Matrix* matrix, int row, float* out) { unpack_row(*matrix, row, out); }
}

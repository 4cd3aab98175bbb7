// AMX in plain C++, for tests where the processor has none: compiled before step.cpp over the portable registers, so that the
// code around the tiles runs everywhere, also under sanitizers. Written from the operation sections of Intel's instruction set
// reference. Like the processor it refuses tiles that are not shaped, and shapes that do not fit together.

#define USE_AMX 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    int num_lines = 0, line_bytes = 0;
    uint8_t lines[16][64] = {};
};

inline thread_local Tile tiles[8];
inline long num_products = 0;

inline void check(bool is_right, const char* wanted) {
    if (is_right) return;
    std::fprintf(stderr, "emulated tiles: %s\n", wanted);
    std::abort();
}

inline Tile& shaped(int tile) {
    check(tiles[tile].num_lines > 0, "a tile that is used is shaped");
    return tiles[tile];
}

template <typename Value>
Value& at(Tile& tile, int line, int i) {
    return reinterpret_cast<Value*>(tile.lines[line])[i];
}

/// Lines of `a` are as long as `b` has lines: both are counted in 4 bytes.
inline void check_product(const Tile& sums, const Tile& a, const Tile& b) {
    check(sums.num_lines == a.num_lines && sums.line_bytes == b.line_bytes && a.line_bytes == 4 * b.num_lines, "shapes fit");
    __atomic_fetch_add(&num_products, 1, __ATOMIC_RELAXED);
}

inline float without_denormals(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float from_bfloat16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return without_denormals(result);
}

}  // namespace emulated

inline void _tile_loadconfig(const void* shapes) {
    const uint8_t* bytes = static_cast<const uint8_t*>(shapes);
    emulated::check(bytes[0] == 1, "palette 1");
    for (int tile = 0; tile < 8; tile++) {
        uint16_t line_bytes;
        std::memcpy(&line_bytes, bytes + 16 + 2 * tile, 2);
        int num_lines = bytes[48 + tile];
        emulated::check(line_bytes <= 64 && num_lines <= 16, "16 lines of 64 bytes at most");
        emulated::tiles[tile] = {num_lines, line_bytes, {}};
    }
}

inline void _tile_release() {
    for (emulated::Tile& tile : emulated::tiles) tile = {};
}

inline void _tile_zero(int tile) { std::memset(emulated::shaped(tile).lines, 0, sizeof emulated::tiles[tile].lines); }

inline void _tile_loadd(int to, const void* memory, long stride) {
    emulated::Tile& tile = emulated::shaped(to);
    for (int i = 0; i < tile.num_lines; i++) std::memcpy(tile.lines[i], static_cast<const char*>(memory) + i * stride, tile.line_bytes);
}

inline void _tile_stored(int from, void* memory, long stride) {
    const emulated::Tile& tile = emulated::shaped(from);
    for (int i = 0; i < tile.num_lines; i++) std::memcpy(static_cast<char*>(memory) + i * stride, tile.lines[i], tile.line_bytes);
}

inline void _tile_dpbssd(int to, int left, int right) {
    emulated::Tile &sums = emulated::shaped(to), &a = emulated::shaped(left), &b = emulated::shaped(right);
    emulated::check_product(sums, a, b);
    for (int m = 0; m < sums.num_lines; m++)
        for (int k = 0; k < b.num_lines; k++)
            for (int n = 0; n < sums.line_bytes / 4; n++)
                for (int i = 0; i < 4; i++)
                    emulated::at<int32_t>(sums, m, n) += emulated::at<int8_t>(a, m, 4 * k + i) * emulated::at<int8_t>(b, k, 4 * n + i);
}

/// Even and odd products are summed apart, then both are added.
inline void _tile_dpbf16ps(int to, int left, int right) {
    using emulated::at, emulated::from_bfloat16;
    emulated::Tile &sums = emulated::shaped(to), &a = emulated::shaped(left), &b = emulated::shaped(right);
    emulated::check_product(sums, a, b);
    for (int m = 0; m < sums.num_lines; m++)
        for (int n = 0; n < sums.line_bytes / 4; n++) {
            float parts[2] = {0.0f, 0.0f};
            for (int k = 0; k < b.num_lines; k++)
                for (int i = 0; i < 2; i++)
                    parts[i] += from_bfloat16(at<uint16_t>(a, m, 2 * k + i)) * from_bfloat16(at<uint16_t>(b, k, 2 * n + i));
            at<float>(sums, m, n) += parts[0] + parts[1];
        }
}

extern "C" inline __attribute__((used)) long emulated_tile_products() { return emulated::num_products; }
extern "C" inline __attribute__((used)) int emulated_tiles_of_this_thread() { return emulated::tiles[0].num_lines; }

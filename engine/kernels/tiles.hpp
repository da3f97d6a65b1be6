// Matrix tiles (AMX) of this thread, by hand: no compiler flag is needed, and none can do it wrong.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TRIOLLAMA_HAS_TILES 1

#include <cstdint>

// Included where it is compiled for an instruction set, too: nothing may leave the file.
namespace triollama::native {
namespace {

struct TileShape { int rows, row_bytes; };

// Tiles of these shapes while in scope. ggml configures its own once for each thread and relies on finding them again.
class TileScope {
public:
    template <int n> explicit TileScope(const TileShape (&shapes)[n]) {
        Config wanted{};
        wanted.palette = 1;
        for (int i = 0; i < n; ++i) {
            wanted.rows[i]      = static_cast<uint8_t>(shapes[i].rows);
            wanted.row_bytes[i] = static_cast<uint16_t>(shapes[i].row_bytes);
        }
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" ::"m"(wanted));
    }
    ~TileScope() {
        if (before.palette) {
            asm volatile("ldtilecfg %0" ::"m"(before));
        } else {
            asm volatile("tilerelease");
        }
    }
    TileScope(const TileScope &) = delete;
    TileScope & operator=(const TileScope &) = delete;

private:
    struct alignas(64) Config {
        uint8_t  palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t  rows[16];
    };
    Config before;
};

}  // namespace
}  // namespace triollama::native

#define TILE_LOAD(tile, base, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(static_cast<long>(stride)) : "memory")
#define TILE_STORE(tile, base, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(static_cast<long>(stride)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define TILE_MULTIPLY_BF16(c, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)
#define TILE_MULTIPLY_INT8(c, a, b) asm volatile("tdpbssd %tmm" #b ", %tmm" #a ", %tmm" #c)

#endif

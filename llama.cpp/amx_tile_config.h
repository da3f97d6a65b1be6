// Force-included into ggml-cpu/amx/mmq.cpp. GCC's own _tile_loadconfig declares that ldtilecfg reads 8 bytes of its
// 64-byte operand; the optimiser then drops the stores of the rest, and the first prefill on a CPU with AMX faults.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#    include <immintrin.h>
#    define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif

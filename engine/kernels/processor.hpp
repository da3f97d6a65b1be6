// What kernels are made for, and whether this processor has it.
//
// A file that is compiled for an instruction set offers constants, which say what they need, and no function that is called
// before somebody has looked: the compiler may put the instructions into any, and into what copies a table. Code that is
// compiled for every processor asks here.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace triollama::native::processor {
namespace {

constexpr unsigned avx2         = 1;    // with FMA and F16C
constexpr unsigned avx_vnni     = 2;
constexpr unsigned avx512       = 4;    // F, BW and VL
constexpr unsigned avx512_vnni  = 8;
constexpr unsigned avx512_bf16  = 16;
constexpr unsigned tiles        = 32;   // AMX's, of BF16 and INT8
constexpr unsigned dot_products = 64;   // of ARM

// Linux grants tiles to a process that asks.
[[maybe_unused]] inline bool tiles_are_granted() {
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
    static const bool granted = [] {
        unsigned a, b, c, d;
        constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;   // BF16, tiles, INT8: a hypervisor may hide any
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) {
            return false;
        }
        constexpr int request_permission = 0x1023, tile_data = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

[[maybe_unused]] inline bool has(unsigned needs) {
    unsigned found = 0;
    const auto note = [&](unsigned feature, bool there) { found |= there ? feature : 0; };
#if defined(__x86_64__) && defined(__GNUC__)
    note(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
    note(avx_vnni, __builtin_cpu_supports("avxvnni"));
    note(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"));
    note(avx512_vnni, __builtin_cpu_supports("avx512vnni"));
    note(avx512_bf16, __builtin_cpu_supports("avx512bf16"));
    note(tiles, (needs & tiles) && tiles_are_granted());
#elif defined(__aarch64__) && defined(__APPLE__)
    note(dot_products, true);   // every processor of theirs
#elif defined(__aarch64__) && defined(__linux__)
    note(dot_products, getauxval(AT_HWCAP) & 1ul << 20);   // HWCAP_ASIMDDP
#endif
    return (needs & ~found) == 0;
}

}  // namespace
}  // namespace triollama::native::processor

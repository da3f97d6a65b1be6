#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx2.hpp"
#include "kernels/attend.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

namespace {

struct AvxVnni : Avx2 {
    static constexpr bool wants_signed = false;
    static Ints dot(Ints sum, Bytes w, const int8_t * a) { return _mm256_dpbusd_avx_epi32(sum, w, four(a)); }
};

}  // namespace

static bool available() {
    return __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

const Kernel & avx_vnni_kernel() {
    static constexpr Kernel kernel = [] {
        Kernel made = { "avx-vnni", available, AvxVnni::quantize, {}, {}, attend_with<AvxVnni>() };
        fill<AvxVnni>(made);
        return made;
    }();
    return kernel;
}

}  // namespace triollama::native::kernels
#endif

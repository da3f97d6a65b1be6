#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx2.hpp"
#include "kernels/attend.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

static bool available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const Kernel & avx2_kernel() {
    static constexpr Kernel kernel = [] {
        Kernel made = { "avx2", available, Avx2::quantize, {}, {}, attend_with<Avx2>() };
        fill<Avx2>(made);
        return made;
    }();
    return kernel;
}

}  // namespace triollama::native::kernels
#endif

#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx512.hpp"
#include "kernels/attend.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

static bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const Kernel & avx512_kernel() {
    static constexpr Kernel kernel = [] {
        Kernel made = { "avx512", available, Avx512::quantize, {}, {}, attend_with<Avx512>() };
        fill<Avx512>(made);
        return made;
    }();
    return kernel;
}

}  // namespace triollama::native::kernels
#endif

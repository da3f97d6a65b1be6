#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx2.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

namespace {

struct AvxVnni : Avx2 {
    static constexpr bool wants_signed = false;
    static Ints dot(Ints sum, Bytes w, const int8_t * a) { return _mm256_dpbusd_avx_epi32(sum, w, four(a)); }
};

}  // namespace

constexpr Kernel avx_vnni_kernel = kernel_of<AvxVnni>("avx-vnni", processor::avx2 | processor::avx_vnni);

}  // namespace triollama::native::kernels
#endif

#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx512.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

constexpr Kernel avx512_kernel = kernel_of<Avx512>("avx512", avx512_needs);

}  // namespace triollama::native::kernels
#endif

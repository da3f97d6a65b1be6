#include "kernels/sets.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx2.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {

constexpr Kernel avx2_kernel = kernel_of<Avx2>("avx2", processor::avx2);

}  // namespace triollama::native::kernels
#endif

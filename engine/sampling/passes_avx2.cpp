#include "sampling/passes.hpp"

#if TRIOLLAMA_X86_PASSES

#include "sampling/passes_code.hpp"

namespace triollama::native {

constexpr Passes avx2_passes = passes;

}  // namespace triollama::native

#endif

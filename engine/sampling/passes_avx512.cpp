#include "sampling/passes.hpp"

#if TRIOLLAMA_X86_PASSES

#include "sampling/passes_code.hpp"

namespace triollama::native {

constexpr Passes avx512_passes = passes;

}  // namespace triollama::native

#endif

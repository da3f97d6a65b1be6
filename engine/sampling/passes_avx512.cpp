#include "sampling/passes.hpp"

#if TRIOLLAMA_X86_PASSES

#include "sampling/passes_code.hpp"

namespace triollama::native {

const Passes * avx512_passes() { return __builtin_cpu_supports("avx512f") ? &passes : nullptr; }

}  // namespace triollama::native

#endif

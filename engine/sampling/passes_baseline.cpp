#include "sampling/passes_code.hpp"

namespace triollama::native {

constexpr Passes baseline_passes = passes;

}  // namespace triollama::native

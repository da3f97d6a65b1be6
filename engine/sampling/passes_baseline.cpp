#include "sampling/passes_code.hpp"

namespace triollama::native {

const Passes & baseline_passes() { return passes; }

}  // namespace triollama::native

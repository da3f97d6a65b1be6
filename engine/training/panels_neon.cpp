#include "training/panels.hpp"

#if TRIOLLAMA_ARM_PANELS

#include "training/panel_vectors.hpp"

namespace triollama::native::panels {

constexpr Kernel neon_panels = {
    vector_i, sizeof(float), 1, lanes, rows_at_once, 0, dequantizer, pack_vectors, multiply_vectors, put_side_by_side, nullptr,
};

}  // namespace triollama::native::panels

#endif

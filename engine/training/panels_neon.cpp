#include "training/panels.hpp"

#if TRIOLLAMA_ARM_PANELS

#include "training/panel_vectors.hpp"

namespace triollama::native::panels {

namespace {

bool works() {
    return true;
}

}  // namespace

const Kernel neon_panels = {
    vector_i, sizeof(float), 1, lanes, works, dequantizer, pack_vectors, multiply_vectors, nullptr,
};

}  // namespace triollama::native::panels

#endif

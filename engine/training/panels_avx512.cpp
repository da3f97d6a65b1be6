#include "training/panels.hpp"

#if TRIOLLAMA_X86_PANELS

#include "training/panel_vectors.hpp"

namespace triollama::native::panels {

constexpr Kernel avx512_panels = {
    vector_i, sizeof(float), 1, lanes, rows_at_once, processor::avx2 | processor::avx512, dequantizer, pack_vectors, multiply_vectors, put_side_by_side, nullptr,
};

}  // namespace triollama::native::panels

#endif

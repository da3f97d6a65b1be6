// Our kernels as a buffer type of ggml's CPU backend: weights that lie in such a buffer are packed (kernels/layout.hpp),
// and ggml hands us the operations that read them.
#pragma once

#include <string>
#include <vector>

namespace triollama::native::kernels {

// Instruction sets that this processor has kernels for, fastest first; the last one is for comparison. Where it is the
// only one, or with TRIOLLAMA_KERNELS=OFF, models are loaded without.
std::vector<std::string> kernel_names();

// Whether models are loaded with them, and attention of exact contexts is ours.
bool available();

// From now on products are made with this one; with the fastest, if it is empty. They are the same, bit for bit. False if
// there is none of that name.
bool use_kernel(const std::string & name);

// Tells the CPU backend, which asks us first from then on, before any type of upstream's. Once, while the extension is
// loaded: what is made here at the first call, a child could be forked in the middle of.
void install();

// While in scope, the models that this thread loads have no weights with us. Scopes do not nest.
class WithoutKernels {
public:
    WithoutKernels();
    ~WithoutKernels();
    WithoutKernels(const WithoutKernels &) = delete;
    WithoutKernels & operator=(const WithoutKernels &) = delete;
};

}  // namespace triollama::native::kernels

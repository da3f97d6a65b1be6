// Our kernels as a buffer type of ggml's CPU backend: weights that lie in such a buffer are packed (kernels/layout.hpp),
// and ggml hands us the operations that read them.
#pragma once

#include <string>
#include <vector>

namespace triollama::native::kernels {

// Why no model can be loaded with them, or nothing.
std::string why_no_kernels();

// Instruction sets that this processor has kernels for, fastest first.
std::vector<std::string> kernel_names();

// From now on products are made with this one; with the fastest, if it is empty. They are the same, bit for bit. False if
// there is none of that name.
bool use_kernel(const std::string & name);

// Tells the CPU backend. Before any model is loaded; later calls do nothing.
void install();

// While in scope, the models that this thread loads have their weights with us where we know their type, and no others
// in an order of upstream's; or, without kernels, none with us. Scopes do not nest.
class LoadScope {
public:
    explicit LoadScope(bool with_kernels);
    ~LoadScope();
    LoadScope(const LoadScope &) = delete;
    LoadScope & operator=(const LoadScope &) = delete;
};

}  // namespace triollama::native::kernels

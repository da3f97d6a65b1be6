// Matrix products of training on a CPU. Training meets every weight of a model two times forward and once backward,
// with hundreds of columns: ggml's products are made for serving, and know neither a transposed quantised matrix nor
// tiles of BF16. Here a matrix of any type is dequantised panel by panel where it is multiplied.
#pragma once

#include "ggml.h"

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace triollama::native {

enum class ProductKernel {
    portable, // ggml's, in the form that GPU backends want: dequantised by row lookup, contiguous, no custom operation
    ggml,     // ggml's, with a transposition of ours
    vector,   // F32 throughout
    dots,     // both sides rounded to BF16, sums in F32: AVX-512's products of pairs; small products as `vector`
    tiles,    // the same by Intel's AMX
};

// Whether this build on this machine has it.
bool has_product_kernel(ProductKernel kernel);

// The best for the purpose: `exact` admits F32 only.
ProductKernel best_product_kernel(bool exact);

// Whether F32 vectors are faster here than ggml's quantised products, as they are when 16 values wide.
bool f32_outruns_quantized();

const char * product_kernel_name(ProductKernel kernel);

// Turns products of one graph into custom operations.
class ProductRewriter {
public:
    // Weights met by `ggml` in their own type stay as they are if `weights_too` is false.
    ProductRewriter(ggml_context * context, ProductKernel kernel, bool weights_too)
        : context(context), kernel(kernel), weights_too(weights_too) {}

    // `node` may be any; MUL_MAT and OUT_PROD that a kernel can do are changed in place, and true is returned.
    bool rewrite(ggml_tensor * node);

    // A sum of such a product, which nobody else reads, and something else is made one operation: the product, which adds.
    // A product that has a place already is read there, by another graph.
    // `readers`: how many there are of each node.
    bool take_sum(ggml_tensor * node, const std::unordered_map<const ggml_tensor *, int> & readers);

    // Afterwards: memory for what so many threads at most work in.
    void give_room(int threads);

private:
    void needs_room(ggml_tensor * node, size_t bytes_of_a_thread);
    ggml_tensor * rows_of(ggml_tensor * x, bool transposed, bool packed);

    ggml_context * context;
    ProductKernel  kernel;
    bool           weights_too;
    std::unordered_map<ggml_tensor *, ggml_tensor *> prepared[4];   // by transposed, packed
    std::unordered_set<const ggml_tensor *> products;               // that stand by themselves
    std::vector<ggml_tensor *> in_room;                             // what needs some
    size_t room = 0;                                                // the most that a thread needs
};

// The matrix behind a cast or a row lookup that only dequantises it, else `tensor`.
ggml_tensor * undequantized(ggml_tensor * tensor);

}  // namespace triollama::native

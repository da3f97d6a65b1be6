// Products of packed weights with rows of activations, shared by the threads of a computation.
#pragma once

#include "kernels/layout.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace triollama::native::kernels {

// Those that this processor can run, fastest first; the portable one is always there.
const std::vector<const Kernel *> & available_kernels();

// What products are made with: the fastest, unless another of these was named. False if there is none of that name.
bool choose_kernel(const char * name);
const Kernel & chosen_kernel();

// All of one type and width, but not necessarily of one number of rows.
struct Group {
    const uint8_t * panels;
    int64_t         n_columns;   // rows of weights
    int64_t         first, n;    // of the rows of activations that meet them
};

struct Product {
    Type               type;
    int64_t            n_blocks;   // of a row
    std::vector<Row>   rows;
    std::vector<Group> groups;
};

// How the threads of a computation go together.
class Team {
public:
    const int ith, nth;
    // Returns once all threads have called it. `next` then counts from nth.
    virtual void meet() = 0;
    virtual int64_t next() = 0;   // what no other thread gets

protected:
    Team(int ith, int nth) : ith(ith), nth(nth) {}
    ~Team() = default;
};

// Bytes of memory that the threads share.
size_t work_bytes(Type type, int64_t n_blocks, int64_t n_rows, int64_t n_groups);

// Called by all threads, with equal arguments.
void multiply(const Product & product, uint8_t * work, Team & team);

}  // namespace triollama::native::kernels

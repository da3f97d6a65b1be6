// Products of packed weights with rows of activations, shared by the threads of a computation.
#pragma once

#include "kernels/layout.hpp"
#include "kernels/workspace.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace triollama::native::kernels {

// Those that this processor can run, fastest first; the portable one is always there.
const std::vector<const Kernel *> & available_kernels();

// What products are made with: the fastest, unless another of these was named. False if there is none of that name.
bool choose_kernel(const char * name);
const Kernel & chosen_kernel();

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

// Rows of activations with the weights that they meet: group by group, all of one type and width, but not necessarily of
// one number of rows. Each thread makes one, the same as the others do.
class Product {
public:
    // Workspace for so many rows and groups; `ith` is this thread's number among the nth that share the workspace.
    Product(Workspace & workspace, Type type, int64_t n_blocks, int64_t max_rows, int64_t max_groups, int ith, int nth);

    // n_columns rows of weights, met by the rows that are added until the next group begins. One without rows is none.
    void begin_group(const uint8_t * panels, int64_t n_columns);
    void add_row(Row row);

    // Called by all threads.
    void multiply(Team & team) const;

private:
    struct Group;

    bool is_few() const;

    const Type      type;
    const int64_t   n_blocks;   // of a row
    const int64_t   max_rows;
    Row *           rows;
    Group *         groups;
    int64_t         n_rows = 0, n_groups = 0;
    uint8_t *       tiles;      // all threads' or, where there are few, this thread's
    uint8_t *       scratch;    // this thread's
};

}  // namespace triollama::native::kernels

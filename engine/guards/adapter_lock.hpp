// A model lists its adapters in a table. Every computation reads it, to know how large its graph may be; loading and
// freeing an adapter change it, in whatever thread. So who computes holds the table with others, and who changes it alone.
#pragma once

#include "llama.h"

namespace triollama::native {

// Waits while somebody changes the table, or waits to change it.
class ReadingAdapters {
public:
    explicit ReadingAdapters(const llama_model * model);
    ~ReadingAdapters();
    ReadingAdapters(const ReadingAdapters &) = delete;
    ReadingAdapters & operator=(const ReadingAdapters &) = delete;

private:
    const llama_model * model;
};

// Waits for the computations of the model that are under way: not inside one.
class ChangingAdapters {
public:
    enum class When { free, now };

    // With `now` it does not wait; false then tells that it would have had to.
    explicit ChangingAdapters(const llama_model * model, When when = When::free);
    ~ChangingAdapters();
    ChangingAdapters(const ChangingAdapters &) = delete;
    ChangingAdapters & operator=(const ChangingAdapters &) = delete;

    explicit operator bool() const { return held; }

private:
    const llama_model * model;
    bool held = false;
};

}  // namespace triollama::native

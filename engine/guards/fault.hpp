// What a file's numbers can make llama.cpp do while it loads a model or builds a graph, where it neither asserts nor
// checks: follow a null pointer to a tensor that is not there, or divide by zero.
#pragma once

namespace triollama::native {

// While it lives and was entered, both throw native_abort on this thread if they happen in our own code, as they do: in
// ggml's C, which builds the graph's nodes and has tables to unwind by. (A C++ function of llama.cpp that would clean up
// as it is left at such an instruction still ends the process.) Linux with GCC; elsewhere nothing.
class FaultScope {
public:
    FaultScope() = default;
    ~FaultScope();
    FaultScope(const FaultScope &) = delete;
    FaultScope & operator=(const FaultScope &) = delete;

    void enter();
    // What happened while it lived, or nullptr: llama.cpp catches the exception and only logs it.
    const char * fault() const;

private:
    bool entered = false;
};

}  // namespace triollama::native

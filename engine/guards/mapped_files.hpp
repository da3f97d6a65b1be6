// Where llama.cpp has mapped the files of models, and what happens when such a file becomes shorter.
//
// Reading a mapped page that its file no longer has is a SIGBUS, which ends the process. While any file is mapped the
// signal is ours: in a mapping of llama.cpp's the lost pages become zeros, it is noted, and the computation ends as it
// would have, to be thrown away (see ModelFiles). Every other SIGBUS goes to the handler that was there before.
// Linux alone: elsewhere the linker cannot show us who calls mmap, or a mapped file cannot be cut (Windows).
#pragma once

#include <atomic>
#include <memory>

namespace triollama::native {

// What becomes of one model's mappings.
struct MappedState {
    std::atomic<int>  mappings{0};
    std::atomic<bool> lost{false};      // pages were read that the file no longer has
};

// While it lives, what this thread maps is noted in `state`, until it is unmapped.
class MappingScope {
public:
    explicit MappingScope(std::shared_ptr<MappedState> state);
    ~MappingScope();
    MappingScope(const MappingScope &) = delete;
    MappingScope & operator=(const MappingScope &) = delete;
};

}  // namespace triollama::native

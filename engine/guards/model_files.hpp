// The files of a model, held open from before it is loaded until it is freed: what they were then, and whether they
// still are. A file that another one replaced under its name stays as it is; one that is written to does not.
#pragma once

#include "guards/mapped_files.hpp"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace triollama::native {

struct FileMark {
    std::string path;
    int      fd    = -1;        // for reading; -1 where files are not held open (Windows)
    uint64_t device = 0, inode = 0;
    int64_t  size = 0, modified = 0, changed = 0;       // times in ns; `changed` is that of the inode
};

class ModelFiles {
public:
    ModelFiles() = default;
    ~ModelFiles();
    ModelFiles(const ModelFiles &) = delete;
    ModelFiles & operator=(const ModelFiles &) = delete;

    void open(const std::string & path);        // throws file_error

    // What this thread maps while the scope lives is mapped from these files.
    MappingScope mapping() const { return MappingScope(state); }

    // `model` was loaded from them. Throws model_changed if a file, or what its path leads to, changed meanwhile.
    void adopt(const llama_model * model);

    const std::vector<FileMark> & marks() const { return files; }

    // Throws model_changed if a file was written to since, or lost pages that were read.
    void check() const;
    // The same of the model's files, if it is known and any of them is still mapped.
    static void check(const llama_model * model);

private:
    std::vector<FileMark> files;
    std::shared_ptr<MappedState> state = std::make_shared<MappedState>();
    const llama_model * model = nullptr;
};

}  // namespace triollama::native

#include "guards/model_files.hpp"

#include "guards/errors.hpp"
#include "threads/per_process.hpp"

#include <fcntl.h>
#include <mutex>
#include <sys/stat.h>
#include <unordered_map>
#include <unistd.h>

namespace triollama::native {

namespace {

struct Known {
    std::mutex mutex;
    std::unordered_map<const llama_model *, const ModelFiles *> files;      // of the models that are loaded
};
Known & known() { return per_process<Known>(); }

int64_t nanoseconds(const struct timespec & t) { return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec; }

FileMark mark_of(const struct stat & status) {
    FileMark mark;
    mark.device = uint64_t(status.st_dev);
    mark.inode  = uint64_t(status.st_ino);
    mark.size   = int64_t(status.st_size);
#if   defined(__APPLE__)
    mark.modified = nanoseconds(status.st_mtimespec);
    mark.changed  = nanoseconds(status.st_ctimespec);
#else
    mark.modified = nanoseconds(status.st_mtim);
    mark.changed  = nanoseconds(status.st_ctim);
#endif
    return mark;
}

}  // namespace

ModelFiles::~ModelFiles() {
    if (model) {        // which is freed after this: before, its address cannot be another's
        const std::lock_guard<std::mutex> lock(known().mutex);
        known().files.erase(model);
    }
    for (const FileMark & file : files) {
        close(file.fd);
    }
}

void ModelFiles::open(const std::string & path) {
    struct stat status;
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        throw file_error(path);
    }
    if (fstat(fd, &status) != 0) {
        const int code = errno;
        close(fd);
        throw file_error(path, code);
    }
    files.push_back(mark_of(status));
    files.back().fd = fd;
    files.back().path = path;
}

void ModelFiles::adopt(const llama_model * loaded) {
    check();
    for (const FileMark & file : files) {
        struct stat status;
        if (stat(file.path.c_str(), &status) != 0 || uint64_t(status.st_ino) != file.inode
            || uint64_t(status.st_dev) != file.device) {
            throw model_changed(file.path + " was replaced while it was loaded");
        }
    }
    const std::lock_guard<std::mutex> lock(known().mutex);
    known().files[loaded] = this;
    model = loaded;
}

void ModelFiles::check() const {
    if (state->lost.load()) {
        throw model_changed(files.front().path + " was cut short while it was in use");
    }
    for (const FileMark & file : files) {
        struct stat status;
        if (fstat(file.fd, &status) != 0) {
            throw file_error(file.path);
        }
        const FileMark now = mark_of(status);
        if (now.size != file.size || now.modified != file.modified) {
            throw model_changed(file.path + " was written to while it was in use");
        }
    }
}

void ModelFiles::check(const llama_model * model) {
    const std::lock_guard<std::mutex> lock(known().mutex);
    const auto it = known().files.find(model);
    if (it != known().files.end() && it->second->state->mappings.load() > 0) {
        it->second->check();
    }
}

}  // namespace triollama::native

// Saved sequences in one file without a name, written beside the decoder's thread.
//
// The file was deleted when it was made: nothing of it outlives the process, however that ends, so nothing in it can be
// taken for another's. What is read back is checked all the same; what cannot be written or read is simply not there.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "threads/worker.hpp"

namespace triollama::native {

class DiskStore {
public:
    // `fd` stays the caller's; -1 or a budget of 0: keeps nothing.
    DiskStore(int fd, size_t budget) : fd(fd), budget(fd < 0 ? 0 : budget) {}
    ~DiskStore() {
        closing = true;
        worker.stop();
    }

    bool put(uint64_t id, std::string & bytes); // takes the bytes, or returns false: no room
    std::string get(uint64_t id);               // empty: not there, or damaged
    void erase(uint64_t id);
    size_t size_of(uint64_t id) const;          // 0: not there
    bool holds_at_all(size_t size) const { return size <= budget; }

    size_t used() const;
    int64_t failures() const;                   // writes and reads that did not succeed

private:
    struct Entry {
        uint64_t id = 0;
        size_t size = 0;
        uint32_t checksum = 0;
        std::string bytes;                      // until they are written
        bool writing = false;                   // the worker reads `bytes`
        bool dropped = false;                   // while writing: goes once that is done
    };
    using Entries = std::map<size_t, std::unique_ptr<Entry>>;    // by offset

    Entries::iterator find(uint64_t id);
    void write(size_t offset);

    const int fd;
    const size_t budget;
    mutable std::mutex mutex;
    std::condition_variable written;
    Entries entries;
    size_t held = 0;                            // bytes that can be had
    size_t waiting = 0;                         // bytes that are not written yet
    int64_t failed = 0;
    std::atomic<bool> closing{false};           // what waits need not be written any more
    Worker worker;
};

}  // namespace triollama::native

#include "kv/disk.hpp"

#include "guards/checksum.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <unistd.h>

namespace triollama::native {

namespace {

// More than this does not wait in memory for a slow disk.
constexpr size_t MOST_WAITING = size_t(256) << 20;
constexpr size_t PIECE = size_t(1) << 30;       // as much as one call takes on every system

int64_t write_some(int fd, const char * data, size_t size, size_t offset) { return pwrite(fd, data, size, (off_t) offset); }
int64_t read_some(int fd, char * data, size_t size, size_t offset) { return pread(fd, data, size, (off_t) offset); }

template <class Call> bool all(Call call, size_t size) {
    for (size_t done = 0; done < size;) {
        const int64_t n = call(done, std::min(size - done, PIECE));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        done += (size_t) n;
    }
    return true;
}

uint32_t checksum_of(const std::string & bytes) { return state_checksum((const uint8_t *) bytes.data(), bytes.size()); }

}  // namespace

DiskStore::Entries::iterator DiskStore::find(uint64_t id) {
    return std::find_if(entries.begin(), entries.end(), [id](const auto & e) { return e.second->id == id && !e.second->dropped; });
}

bool DiskStore::put(uint64_t id, std::string & bytes) {
    const size_t size = bytes.size();
    if (size == 0 || size > budget) {
        return false;
    }
    erase(id);
    std::unique_lock<std::mutex> lock(mutex);
    written.wait(lock, [&] { return waiting == 0 || waiting + size <= MOST_WAITING; });
    size_t offset;
    for (;;) {
        offset = 0;
        bool leaving = false;
        for (const auto & [start, entry] : entries) {   // the first gap that is large enough
            if (start - offset >= size) {
                break;
            }
            offset = start + entry->size;
            leaving = leaving || entry->dropped;
        }
        if (offset <= budget && budget - offset >= size) {
            break;
        }
        if (!leaving) {
            return false;
        }
        written.wait(lock);                             // room that was given up, but is still being written
    }
    auto entry = std::make_unique<Entry>();
    entry->id      = id;
    entry->size    = size;
    entry->bytes   = std::move(bytes);
    entry->writing = true;
    waiting += size;
    held += size;
    entries[offset] = std::move(entry);
    lock.unlock();
    worker.run([this, offset] { write(offset); });
    return true;
}

// On the worker's thread. The entry stays where it is while `writing`.
void DiskStore::write(size_t offset) {
    Entry * entry;
    {
        std::lock_guard<std::mutex> lock(mutex);
        entry = entries.at(offset).get();
    }
    const std::string & bytes = entry->bytes;
    const uint32_t sum = checksum_of(bytes);
    const bool good = !closing && all([&](size_t at, size_t n) { return write_some(fd, bytes.data() + at, n, offset + at); }, bytes.size());
    std::lock_guard<std::mutex> lock(mutex);
    waiting -= entry->size;
    failed += !good;
    entry->checksum = sum;
    entry->writing  = false;
    entry->bytes    = std::string();
    held -= good || entry->dropped ? 0 : entry->size;
    if (!good || entry->dropped) {
        entries.erase(offset);
    }
    written.notify_all();
}

std::string DiskStore::get(uint64_t id) {
    std::string bytes;
    size_t offset;
    uint32_t sum;
    {
        std::lock_guard<std::mutex> lock(mutex);
        const auto found = find(id);
        if (found == entries.end()) {
            return {};
        }
        if (found->second->writing) {
            return found->second->bytes;
        }
        offset = found->first;
        sum    = found->second->checksum;
        bytes.resize(found->second->size);
    }
    // Nobody else erases entries that are written, so this one stays.
    const bool good = all([&](size_t at, size_t n) { return read_some(fd, bytes.data() + at, n, offset + at); }, bytes.size());
    if (good && checksum_of(bytes) == sum) {
        return bytes;
    }
    std::lock_guard<std::mutex> lock(mutex);
    failed++;
    return {};
}

void DiskStore::erase(uint64_t id) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = find(id);
    if (found == entries.end()) {
        return;
    }
    held -= found->second->size;
    if (found->second->writing) {
        found->second->dropped = true;
    } else {
        entries.erase(found);
    }
}

size_t DiskStore::size_of(uint64_t id) const {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto & e : entries) {
        if (e.second->id == id && !e.second->dropped) {
            return e.second->size;
        }
    }
    return 0;
}

size_t DiskStore::used() const {
    std::lock_guard<std::mutex> lock(mutex);
    return held;
}

int64_t DiskStore::failures() const {
    std::lock_guard<std::mutex> lock(mutex);
    return failed;
}

}  // namespace triollama::native

#include "guards/mapped_files.hpp"

#include "threads/per_process.hpp"

#include <utility>

#if defined(TRIOLLAMA_WRAPS_MMAP)
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

// The linker gives these to whoever in the extension calls mmap and munmap: see CMakeLists.txt.
extern "C" {
void * __real_mmap(void * at, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void * at, size_t size);
void * __wrap_mmap(void * at, size_t size, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void * at, size_t size);
}
#endif

namespace triollama::native {

namespace {

thread_local std::shared_ptr<MappedState> current;

#if defined(TRIOLLAMA_WRAPS_MMAP)

// Read by the signal handler, so without locks: a mapping is there when its end is.
struct Mapping {
    std::atomic<uintptr_t> begin{0};
    std::atomic<uintptr_t> end{0};
    std::atomic<MappedState *> state{nullptr};
    std::shared_ptr<MappedState> owner;
};

constexpr size_t max_mappings = 1024;       // beyond it a mapping has no guard
Mapping table[max_mappings];
struct Changing {
    std::mutex mutex;                       // of who changes the table
};
std::mutex & changing() { return per_process<Changing>().mutex; }
std::atomic<size_t> n_mappings{0};
struct sigaction previous;
bool guarding = false;
const uintptr_t page_size = uintptr_t(sysconf(_SC_PAGESIZE));

void on_sigbus(int number, siginfo_t * info, void * context) {
    const int saved = errno;
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Mapping & mapping : table) {
        const uintptr_t end = mapping.end.load(std::memory_order_acquire);
        if (info->si_code <= 0 || at >= end || at < mapping.begin.load(std::memory_order_relaxed)) {
            continue;
        }
        // From here to the end at once: the next page would come next.
        const uintptr_t page = at & ~(page_size - 1);
        if (__real_mmap(reinterpret_cast<void *>(page), end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                        -1, 0) != MAP_FAILED) {
            mapping.state.load(std::memory_order_relaxed)->lost.store(true);
            errno = saved;
            return;
        }
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else {
        sigaction(number, &previous, nullptr);      // and the instruction is tried again
        if (info->si_code <= 0) {
            raise(number);
        }
    }
    errno = saved;
}

void guard_signal() {
    struct sigaction found;
    if (sigaction(SIGBUS, nullptr, &found) != 0) {
        return;
    }
    const bool unhandled = !(found.sa_flags & SA_SIGINFO) && (found.sa_handler == SIG_DFL || found.sa_handler == SIG_IGN);
    if (guarding && !unhandled) {
        return;     // ours, or somebody's who came after us and calls us in turn
    }
    previous = found;
    struct sigaction action = {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags     = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    guarding = sigaction(SIGBUS, &action, nullptr) == 0;
}

void release_signal() {
    struct sigaction found;
    if (sigaction(SIGBUS, nullptr, &found) == 0 && (found.sa_flags & SA_SIGINFO) && found.sa_sigaction == on_sigbus) {
        sigaction(SIGBUS, &previous, nullptr);
        guarding = false;
    }
}

void add(uintptr_t begin, uintptr_t end, std::shared_ptr<MappedState> state) {
    for (Mapping & mapping : table) {
        if (mapping.end.load() == 0) {
            guard_signal();
            n_mappings++;
            state->mappings++;
            mapping.begin.store(begin);
            mapping.state.store(state.get());
            mapping.owner = std::move(state);
            mapping.end.store(end, std::memory_order_release);
            return;
        }
    }
}

void on_map(void * at, size_t size) {
    const std::lock_guard<std::mutex> lock(changing());
    const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
    add(begin, (begin + size + page_size - 1) & ~(page_size - 1), current);
}

// llama.cpp unmaps what it does not need, too: a piece anywhere.
void on_unmap(void * at, size_t size) {
    if (n_mappings == 0) {
        return;
    }
    const std::lock_guard<std::mutex> lock(changing());
    const uintptr_t first = reinterpret_cast<uintptr_t>(at);
    const uintptr_t last  = (first + size + page_size - 1) & ~(page_size - 1);
    for (Mapping & mapping : table) {
        const uintptr_t begin = mapping.begin.load();
        const uintptr_t end   = mapping.end.load();
        if (end == 0 || last <= begin || first >= end) {
            continue;
        }
        std::shared_ptr<MappedState> state = std::move(mapping.owner);
        mapping.end.store(0);
        state->mappings--;
        n_mappings--;
        if (begin < first) {
            add(begin, first, state);
        }
        if (last < end) {
            add(last, end, state);
        }
    }
    if (n_mappings == 0) {
        release_signal();
    }
}

#endif

}  // namespace

MappingScope::MappingScope(std::shared_ptr<MappedState> state) { current = std::move(state); }

MappingScope::~MappingScope() { current.reset(); }

}  // namespace triollama::native

#if defined(TRIOLLAMA_WRAPS_MMAP)
void * __wrap_mmap(void * at, size_t size, int protection, int flags, int fd, off_t offset) {
    void * begin = __real_mmap(at, size, protection, flags, fd, offset);
    if (begin != MAP_FAILED && fd >= 0 && triollama::native::current) {
        triollama::native::on_map(begin, size);
    }
    return begin;
}

int __wrap_munmap(void * at, size_t size) {
    triollama::native::on_unmap(at, size);
    return __real_munmap(at, size);
}
#endif

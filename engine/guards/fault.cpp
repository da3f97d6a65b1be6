#include "guards/fault.hpp"

#if defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && (defined(__x86_64__) || defined(__aarch64__))
#define TRIOLLAMA_FAULTS
#include "guards/abort.hpp"
#include "threads/openmp.hpp"
#include "threads/per_process.hpp"

#include <csignal>
#include <cstdint>
#include <link.h>
#include <mutex>
#include <ucontext.h>
#endif

namespace triollama::native {

#if defined(TRIOLLAMA_FAULTS)

namespace {

constexpr uintptr_t null_page = 1 << 16;    // no member of a tensor is further from its beginning
constexpr int signals[] = {SIGSEGV, SIGFPE};

thread_local int depth = 0;
thread_local const char * last_fault = nullptr;
struct Changing {
    std::mutex mutex;
};
std::mutex & changing() { return per_process<Changing>().mutex; }
int n_scopes = 0;                           // of all threads; of those of a parent, too, when it forked then
struct sigaction previous[2];
uintptr_t code_begin = 0, code_end = 0;     // of the extension

int find_code(dl_phdr_info * info, size_t, void *) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&find_code);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto & segment = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz) {
            code_begin = begin;
            code_end   = begin + segment.p_memsz;
            return 1;
        }
    }
    return 0;
}

bool is_in_our_code(void * context) {
    const mcontext_t & machine = static_cast<ucontext_t *>(context)->uc_mcontext;
#if defined(__x86_64__)
    const uintptr_t at = uintptr_t(machine.gregs[REG_RIP]);
#else
    const uintptr_t at = uintptr_t(machine.pc);
#endif
    return at >= code_begin && at < code_end;
}

#if defined(__x86_64__)
// Entered as if the instruction that faulted had called it, with the stack at any alignment.
[[noreturn, gnu::force_align_arg_pointer]] void throw_fault() { throw native_abort(last_fault); }

// A handler runs with the processor's extended state cleared, and one that throws never gives it back: the thread would
// go on without its rounding mode and without the tiles (Intel AMX) that ggml configures once for each thread, and die
// of SIGILL at the next product. So the handler returns, to throw_fault. It overwrites what a function that calls
// nothing may keep below its stack pointer: nobody reads that again.
void leave_by_throwing(void * context) {
    auto & registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
    registers[REG_RSP] -= sizeof(greg_t);
    // Unwinding looks at the instruction that ends before the address of return.
    *reinterpret_cast<greg_t *>(registers[REG_RSP]) = registers[REG_RIP] + 1;
    registers[REG_RIP] = reinterpret_cast<greg_t>(&throw_fault);
}
#else
void leave_by_throwing(void *) { throw native_abort(last_fault); }
#endif

void on_fault(int number, siginfo_t * info, void * context) {
    if (depth > 0 && in_parallel() <= 0 && info->si_code > 0 && is_in_our_code(context)) {
        if (number == SIGFPE) {
            last_fault = "llama.cpp divided by zero: a number in the file's metadata is 0 or missing";
            leave_by_throwing(context);
            return;
        }
        if (reinterpret_cast<uintptr_t>(info->si_addr) < null_page) {
            last_fault = "the file lacks a tensor that llama.cpp needs for this architecture";
            leave_by_throwing(context);
            return;
        }
    }
    const struct sigaction & before = previous[number == SIGFPE];
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        sigaction(number, &before, nullptr);    // and the instruction is tried again
        if (info->si_code <= 0) {
            raise(number);
        }
    }
}

}  // namespace

void FaultScope::enter() {
    const std::lock_guard<std::mutex> lock(changing());
    if (n_scopes == 0) {
        if (code_end == 0) {
            dl_iterate_phdr(find_code, nullptr);
        }
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags     = SA_SIGINFO | SA_NODEFER;      // on this very stack, which is unwound
        sigemptyset(&action.sa_mask);
        for (int i = 0; i < 2; ++i) {
            sigaction(signals[i], &action, &previous[i]);
        }
    }
    n_scopes++;
    depth++;
    entered = true;
    last_fault = nullptr;
}

const char * FaultScope::fault() const { return last_fault; }

FaultScope::~FaultScope() {
    if (!entered) {
        return;
    }
    const std::lock_guard<std::mutex> lock(changing());
    depth--;
    if (--n_scopes > 0) {
        return;
    }
    for (int i = 0; i < 2; ++i) {
        struct sigaction found;
        if (sigaction(signals[i], nullptr, &found) == 0 && (found.sa_flags & SA_SIGINFO) && found.sa_sigaction == on_fault) {
            sigaction(signals[i], &previous[i], nullptr);
        }
    }
}

#else

void FaultScope::enter() {}
const char * FaultScope::fault() const { return nullptr; }
FaultScope::~FaultScope() {}

#endif

}  // namespace triollama::native

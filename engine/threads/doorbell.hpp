// One descriptor that an event loop can wait on, rung from any thread.
#pragma once

#include <cerrno>
#include <cstdint>
#include <system_error>

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

namespace triollama::native {

class Doorbell {
public:
    Doorbell() {
#ifdef __linux__
        read_end = write_end = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (read_end < 0) {
            throw std::system_error(errno, std::generic_category(), "eventfd");
        }
#else
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) {
            throw std::system_error(errno, std::generic_category(), "socketpair");
        }
        for (int end : ends) {
            fcntl(end, F_SETFD, FD_CLOEXEC);
            fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK);
        }
        read_end  = ends[0];
        write_end = ends[1];
#endif
    }

    ~Doorbell() {
        ::close(read_end);
        if (write_end != read_end) {
            ::close(write_end);
        }
    }

    Doorbell(const Doorbell &) = delete;
    Doorbell & operator=(const Doorbell &) = delete;

    // Readable from now on until silence(). A full socket is a bell that rings already.
    void ring() {
        const uint64_t one = 1;
        while (::write(write_end, &one, sizeof(one)) < 0 && errno == EINTR) {}
    }

    void silence() {
        char bytes[64];
        for (;;) {
            const ssize_t n = ::read(read_end, bytes, sizeof(bytes));
            if (n == (ssize_t) sizeof(bytes) || (n < 0 && errno == EINTR)) {
                continue;
            }
            return;
        }
    }

    int fd() const { return read_end; }

private:
    int read_end;
    int write_end;
};

}  // namespace triollama::native

// llama.cpp logs from any thread, some of which must never wait for the GIL: lines are kept here until Python asks.
#pragma once

#include "threads/per_process.hpp"

#include "ggml.h"

#include <atomic>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

namespace triollama::native {

class LogQueue {
public:
    // What waits when the process forks stays with the parent.
    static LogQueue & instance() { return per_process<LogQueue>(); }

    // The callback for llama_log_set. Pieces without a newline are joined into lines, each thread's for themselves.
    static void write(ggml_log_level level, const char * text, void *) {
        if (!muted() && !Own::gone()) {
            instance().append(level, text ? text : "");
        }
    }

    // Of the calling thread: true while it expects a complaint that tells nobody anything, as after an abort it asked for.
    static bool & muted() {
        static thread_local bool value = false;
        return value;
    }

    // Lines below this level are dropped at once, since nobody would read them.
    void set_threshold(ggml_log_level level) { threshold = level; }

    bool has_lines() const { return count != 0; }

    // The oldest line that waits; false if none does.
    bool take(int & level, std::string & line) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (lines.empty()) {
            return false;
        }
        level = lines.front().first;
        line  = std::move(lines.front().second);
        lines.pop_front();
        count = lines.size();
        return true;
    }

    // Of the calling thread, so that calls at the same time do not take each other's: the first error (llama.cpp goes
    // from cause to consequence), else the latest warning, since forget_problem().
    static std::string problem() { return own().first_error.empty() ? own().last_warning : own().first_error; }

    static void forget_problem() {
        own().first_error.clear();
        own().last_warning.clear();
    }

private:
    static constexpr size_t capacity = 4096;   // lines; the oldest go first

    // llama.cpp warns of what this library chose on purpose; nobody needs to hear of it.
    static bool ours(const std::string & line) {
        return line.find("using full-size SWA cache") != std::string::npos ||
               line.find("model default pooling_type is") != std::string::npos;
    }

    // What a thread has to itself.
    struct Own {
        std::string partial;
        ggml_log_level partial_level = GGML_LOG_LEVEL_INFO;
        std::string first_error;
        std::string last_warning;

        ~Own() { gone() = true; }
        // Destructors that run after this one may still log.
        static bool & gone() {
            static thread_local bool value = false;
            return value;
        }
    };
    static Own & own() {
        static thread_local Own value;
        return value;
    }

    void append(ggml_log_level level, const char * text) {
        Own & mine = own();
        if (level == GGML_LOG_LEVEL_CONT) {
            level = mine.partial_level;
        }
        mine.partial_level = level;
        for (const char * c = text; *c; ++c) {
            if (*c != '\n') {
                mine.partial += *c;
                continue;
            }
            if (!mine.partial.empty()) {
                push(mine, level, std::move(mine.partial));
            }
            mine.partial.clear();
        }
    }

    void push(Own & mine, ggml_log_level level, std::string line) {
        if (level == GGML_LOG_LEVEL_INFO || (level == GGML_LOG_LEVEL_WARN && ours(line))) {
            level = GGML_LOG_LEVEL_DEBUG;   // what llama.cpp tells of itself is detail here
        }
        if (level == GGML_LOG_LEVEL_ERROR && mine.first_error.empty()) {
            mine.first_error = line;
        } else if (level == GGML_LOG_LEVEL_WARN) {
            mine.last_warning = line;
        }
        if (level < threshold) {
            return;
        }
        const std::lock_guard<std::mutex> lock(mutex);
        if (lines.size() == capacity) {
            lines.pop_front();
        }
        lines.emplace_back(level, std::move(line));
        count = lines.size();
    }

    std::mutex mutex;               // guards `lines`
    std::deque<std::pair<int, std::string>> lines;
    std::atomic<ggml_log_level> threshold{GGML_LOG_LEVEL_WARN};
    std::atomic<size_t> count{0};
};

}  // namespace triollama::native

// llama.cpp logs from any thread, some of which must never wait for the GIL: lines are kept here until Python asks.
#pragma once

#include "ggml.h"

#include <atomic>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace triollama {

class LogQueue {
public:
    static LogQueue & instance() {
        static LogQueue * queue = new LogQueue;   // never destroyed: threads may log while the process exits
        return *queue;
    }

    // The callback for llama_log_set. Pieces without a newline are joined into lines.
    static void write(ggml_log_level level, const char * text, void *) {
        if (!muted()) {
            instance().append(level, text ? text : "");
        }
    }

    // Of the calling thread: true while it expects a complaint that tells nobody anything, as after an abort it asked for.
    static bool & muted() {
        static thread_local bool value = false;
        return value;
    }

    void append(ggml_log_level level, const char * text) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (level == GGML_LOG_LEVEL_CONT) {
            level = partial_level;
        }
        partial_level = level;
        for (const char * c = text; *c; ++c) {
            if (*c != '\n') {
                partial += *c;
                continue;
            }
            if (!partial.empty()) {
                push(level, std::move(partial));
            }
            partial.clear();
        }
    }

    // Lines below this level are dropped at once, since nobody would read them.
    void set_threshold(ggml_log_level level) { threshold = level; }

    bool has_lines() const { return count != 0; }

    std::vector<std::pair<int, std::string>> drain() {
        const std::lock_guard<std::mutex> lock(mutex);
        std::vector<std::pair<int, std::string>> out(lines.begin(), lines.end());
        lines.clear();
        count = 0;
        return out;
    }

    // The first error (llama.cpp goes from cause to consequence), else the latest warning, since forget_problem().
    std::string problem() {
        const std::lock_guard<std::mutex> lock(mutex);
        return first_error.empty() ? last_warning : first_error;
    }

    void forget_problem() {
        const std::lock_guard<std::mutex> lock(mutex);
        first_error.clear();
        last_warning.clear();
    }

private:
    static constexpr size_t capacity = 4096;   // lines; the oldest go first

    // llama.cpp warns of what this library chose on purpose; nobody needs to hear of it.
    static bool ours(const std::string & line) {
        return line.find("using full-size SWA cache") != std::string::npos ||
               line.find("model default pooling_type is") != std::string::npos;
    }

    void push(ggml_log_level level, std::string line) {
        if (level == GGML_LOG_LEVEL_INFO || (level == GGML_LOG_LEVEL_WARN && ours(line))) {
            level = GGML_LOG_LEVEL_DEBUG;   // what llama.cpp tells of itself is detail here
        }
        if (level == GGML_LOG_LEVEL_ERROR) {
            if (first_error.empty()) {
                first_error = line;
            }
        } else if (level == GGML_LOG_LEVEL_WARN) {
            last_warning = line;
        }
        if (level < threshold) {
            return;
        }
        if (lines.size() == capacity) {
            lines.pop_front();
        }
        lines.emplace_back(level, std::move(line));
        count = lines.size();
    }

    std::mutex mutex;
    std::deque<std::pair<int, std::string>> lines;
    std::string partial;
    std::string first_error;
    std::string last_warning;
    ggml_log_level partial_level = GGML_LOG_LEVEL_INFO;
    std::atomic<ggml_log_level> threshold{GGML_LOG_LEVEL_WARN};
    std::atomic<size_t> count{0};
};

}  // namespace triollama

// From bytes to text: whole UTF-8 characters only, and stop strings found across pieces. Never needs the GIL.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace triollama::native {

// Turns a stream of token bytes into text that may be shown: never half a character, nothing of a stop string.
// Invalid bytes become U+FFFD, one per maximal subpart, as Python's errors="replace" does.
// How the bytes are cut into pieces makes no difference to the text.
class TextStream {
public:
    TextStream() = default;
    explicit TextStream(std::vector<std::string> stops);       // empty strings never match

    // Takes bytes, appends what may be shown to `out`. Returns true once a stop string is complete:
    // text before it has been emitted, it and what follows has not, and what is fed later is ignored.
    // The stop string that is complete first wins; of several that end together, the longest.
    bool feed(const char * bytes, size_t n, std::string & out);

    // End of stream: emits what was held back (an unfinished character as U+FFFD, a partial stop string as text).
    // The U+FFFD may itself complete a stop string.
    void flush(std::string & out);

    bool stopped() const { return stop_index >= 0; }
    int  matched_stop() const { return stop_index; }      // index into the stop strings, or -1
    size_t pending() const { return held.size() + tail.size(); }   // bytes held back

private:
    // A stop string with its failure table: how much of it the text ends with is known after each byte.
    struct Stop {
        std::string text;
        std::vector<size_t> shorter;    // by matched length: the next shorter beginning that also matches
        size_t matched = 0;
    };

    std::vector<Stop> stops;
    std::string tail;       // bytes of an unfinished character
    std::string held;       // whole characters that may be the start of a stop string
    int stop_index = -1;

    void pass(const char * text, size_t n, std::string & out);
};

}  // namespace triollama::native

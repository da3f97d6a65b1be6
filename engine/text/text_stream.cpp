#include "text/text_stream.hpp"

#include <algorithm>

namespace triollama::native {

namespace {

constexpr const char * replacement = "\xEF\xBF\xBD";        // U+FFFD

// The bounds of the second byte depend on the first (Unicode, table 3-7): no overlong forms, no surrogates,
// nothing above U+10FFFF.
bool continues(unsigned char first, size_t position, unsigned char byte) {
    unsigned char low  = 0x80;
    unsigned char high = 0xBF;
    if (position == 1) {
        switch (first) {
            case 0xE0: low  = 0xA0; break;
            case 0xED: high = 0x9F; break;
            case 0xF0: low  = 0x90; break;
            case 0xF4: high = 0x8F; break;
            default: break;
        }
    }
    return byte >= low && byte <= high;
}

// Length of the character that begins with this byte; 0 if none does.
size_t character_length(unsigned char first) {
    if (first < 0x80) {
        return 1;
    }
    if (first < 0xC2 || first > 0xF4) {
        return 0;
    }
    return first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

}  // namespace

TextStream::TextStream(std::vector<std::string> texts) {
    for (std::string & text : texts) {
        Stop stop;
        stop.shorter.assign(text.size() + 1, 0);
        for (size_t i = 1, matched = 0; i < text.size(); ++i) {
            while (matched > 0 && text[i] != text[matched]) {
                matched = stop.shorter[matched];
            }
            matched += text[i] == text[matched];
            stop.shorter[i + 1] = matched;
        }
        stop.text = std::move(text);
        stops.push_back(std::move(stop));
    }
}

bool TextStream::feed(const char * bytes, size_t n, std::string & out) {
    if (stopped()) {
        return true;
    }
    std::string joined;
    if (!tail.empty()) {
        joined = tail;
        joined.append(bytes, n);
        tail.clear();
        bytes = joined.data();
        n     = joined.size();
    }
    std::string text;
    text.reserve(n);
    for (size_t i = 0; i < n;) {
        const auto first = (unsigned char) bytes[i];
        const size_t length = character_length(first);
        size_t have = length > 0 ? 1 : 0;
        while (have > 0 && have < length && i + have < n && continues(first, have, (unsigned char) bytes[i + have])) {
            ++have;
        }
        if (have > 0 && have == length) {
            text.append(bytes + i, length);
            i += length;
        } else if (have > 0 && i + have == n) {
            tail.assign(bytes + i, have);
            break;
        } else {
            text.append(replacement);
            i += std::max<size_t>(have, 1);
        }
    }
    pass(text.data(), text.size(), out);
    return stopped();
}

void TextStream::flush(std::string & out) {
    if (stopped()) {
        return;
    }
    if (!tail.empty()) {
        tail.clear();
        pass(replacement, 3, out);
    }
    out += held;
    held.clear();
    for (Stop & stop : stops) {
        stop.matched = 0;
    }
}

// Takes whole characters; emits all but the longest end that begins a stop string.
void TextStream::pass(const char * text, size_t n, std::string & out) {
    if (stops.empty()) {
        out.append(text, n);
        return;
    }
    const size_t before = held.size();
    held.append(text, n);
    size_t keep = 0;
    for (size_t i = 0; i < n; ++i) {
        keep = 0;
        size_t longest = 0;
        for (size_t s = 0; s < stops.size(); ++s) {
            Stop & stop = stops[s];
            if (stop.text.empty()) {
                continue;
            }
            while (stop.matched > 0 && text[i] != stop.text[stop.matched]) {
                stop.matched = stop.shorter[stop.matched];
            }
            stop.matched += text[i] == stop.text[stop.matched];
            keep = std::max(keep, stop.matched);
            if (stop.matched == stop.text.size() && stop.matched > longest) {
                longest    = stop.matched;
                stop_index = (int) s;
            }
        }
        if (longest > 0) {
            out.append(held, 0, before + i + 1 - longest);
            held.clear();
            tail.clear();
            return;
        }
    }
    if (n == 0) {
        return;
    }
    out.append(held, 0, held.size() - keep);
    held.erase(0, held.size() - keep);
}

}  // namespace triollama::native

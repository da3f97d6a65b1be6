#include "grammar/byte_sets.hpp"

#include <algorithm>

namespace triollama::native {

namespace {

constexpr uint32_t last_char = 0x10FFFF;

// Disjoint, ascending, without surrogates.
CharRanges normalise(CharRanges ranges, bool negated) {
    std::sort(ranges.begin(), ranges.end());
    CharRanges joined;
    for (auto [low, high] : ranges) {
        high = std::min(high, last_char);
        if (low > high) {
            continue;
        }
        if (!joined.empty() && low <= joined.back().second + 1) {
            joined.back().second = std::max(joined.back().second, high);
        } else {
            joined.emplace_back(low, high);
        }
    }
    if (negated) {
        CharRanges gaps;
        uint32_t next = 0;
        for (const auto & [low, high] : joined) {
            if (next < low) {
                gaps.emplace_back(next, low - 1);
            }
            next = high + 1;
        }
        if (next <= last_char) {
            gaps.emplace_back(next, last_char);
        }
        joined = std::move(gaps);
    }
    // Where the length of UTF-8 changes, and around the surrogates, a range is cut.
    static constexpr std::pair<uint32_t, uint32_t> alike[] = {
        { 0, 0x7F }, { 0x80, 0x7FF }, { 0x800, 0xD7FF }, { 0xE000, 0xFFFF }, { 0x10000, last_char },
    };
    CharRanges cut;
    for (const auto & [low, high] : joined) {
        for (const auto & [first, last] : alike) {
            if (std::max(low, first) <= std::min(high, last)) {
                cut.emplace_back(std::max(low, first), std::min(high, last));
            }
        }
    }
    return cut;
}

int encode(uint32_t c, unsigned char * out) {
    if (c < 0x80) {
        out[0] = (unsigned char) c;
        return 1;
    }
    const int length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; --i) {
        out[i] = (unsigned char) (0x80 | (c & 0x3F));
        c >>= 6;
    }
    out[0] = (unsigned char) (0xF00 >> length | c);
    return length;
}

}  // namespace

uint32_t ByteSets::node_of(const CharRanges & ranges, bool negated) {
    const CharRanges normal = normalise(ranges, negated);
    const auto found = known.find(normal);
    if (found != known.end()) {
        return found->second;
    }
    const auto root = (uint32_t) nodes.size();
    nodes.emplace_back();
    for (const auto & [first, last] : normal) {
        unsigned char low[4];
        unsigned char high[4];
        encode(first, low);
        add(root, low, high, encode(last, high));
    }
    known.emplace(normal, root);
    return root;
}

// Sequences of one length, from low to high: a first byte of its own where what follows it is not everything.
void ByteSets::add(uint32_t node, const unsigned char * low, const unsigned char * high, int length) {
    static constexpr unsigned char lowest[]  = { 0x80, 0x80, 0x80 };
    static constexpr unsigned char highest[] = { 0xBF, 0xBF, 0xBF };
    if (length == 1) {
        nodes[node].push_back({ *low, *high, 0 });
        return;
    }
    if (*low == *high) {
        add(child(node, *low, *low), low + 1, high + 1, length - 1);
        return;
    }
    unsigned char first = *low;
    unsigned char last  = *high;
    if (!std::equal(low + 1, low + length, lowest)) {
        add(child(node, first, first), low + 1, highest, length - 1);
        ++first;
    }
    if (!std::equal(high + 1, high + length, highest)) {
        add(child(node, last, last), lowest, high + 1, length - 1);
        --last;
    }
    if (first <= last) {
        add(child(node, first, last), lowest, highest, length - 1);
    }
}

uint32_t ByteSets::child(uint32_t node, unsigned char low, unsigned char high) {
    for (const ByteRange & range : nodes[node]) {
        if (range.low == low && range.high == high) {
            return range.next;
        }
    }
    const auto next = (uint32_t) nodes.size();
    nodes.emplace_back();
    nodes[node].push_back({ low, high, next });
    return next;
}

}  // namespace triollama::native

// Sets of characters as automata over the bytes of UTF-8.
#pragma once

#include "grammar/gbnf.hpp"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace triollama::native {

// Code points, both ends included; in any order, overlapping or empty ones too.
using CharRanges = std::vector<std::pair<uint32_t, uint32_t>>;

class ByteSets {
public:
    explicit ByteSets(std::vector<ByteNode> & nodes) : nodes(nodes) { nodes.resize(1); }

    // The node of the set, or of what it leaves out. Surrogates and what is beyond U+10FFFF are no characters.
    uint32_t node_of(const CharRanges & ranges, bool negated);

private:
    std::vector<ByteNode> & nodes;
    std::map<CharRanges, uint32_t> known;

    void add(uint32_t node, const unsigned char * low, const unsigned char * high, int length);
    uint32_t child(uint32_t node, unsigned char low, unsigned char high);
};

}  // namespace triollama::native

// Follows a text through a grammar byte by byte, along all ways of reading it at once.
#pragma once

#include "grammar/gbnf.hpp"

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace triollama::native {

// Each way of reading a text is a stack: what comes next, below it what comes after that, and so on. All of them together are
// one set of stacks, kept as a tree from the tops down: entries of (what is on top, the set of the rests). Equal sets are one
// set, so that ways of reading that differ only in the past are one, a state met again is known again, and what follows it is
// looked up instead of computed.
//
// Work is counted: what exceeds the budget of one call throws grammar_error, and so does a stack of sets too deep to unite.
class Matcher {
public:
    using State = uint32_t;

    static constexpr State nothing = 0;         // the text does not fit

    explicit Matcher(std::shared_ptr<const Rules> rules);
    Matcher(const Matcher &) = delete;
    Matcher & operator=(const Matcher &) = delete;

    // A matcher that knows no states but this one, which is replaced by its own name for it.
    std::unique_ptr<Matcher> copy(State & state) const;
    bool is_large() const { return entries.size() > 1000000 || n_tables > 16384; }

    void  renew_budget() { work = 0; }
    State start();
    State after_byte(State state, unsigned char byte);
    bool  takes_token(State state, llama_token token) const;   // along elements that name tokens, as does:
    State after_token(State state, llama_token token);
    State unite(State a, State b) { return unite(a, b, 0); }
    bool  accepts(State state) const { return size_of(state) > 0 && begin(state)->key == 0; }
    bool  must_end(State state) const { return accepts(state) && size_of(state) == 1; }
    bool  names_tokens(State state) const;

private:
    // key: position in the grammar, and where in a character; 0 is the end of the text. rest: a set of stacks of positions.
    struct Entry {
        uint64_t key;
        State    rest;
        bool operator==(const Entry & other) const { return key == other.key && rest == other.rest; }
        bool operator<(const Entry & other) const { return key != other.key ? key < other.key : rest < other.rest; }
    };
    struct Hash {
        const Matcher * matcher;
        size_t operator()(State state) const;
    };
    struct Equal {
        const Matcher * matcher;
        bool operator()(State a, State b) const;
    };
    using Table = std::array<State, 256>;
    class Closure;

    std::shared_ptr<const Rules> rules;
    const uint64_t budget;
    std::vector<Entry>    entries;              // of set 0, of set 1, ...: each sorted, and after those it refers to
    std::vector<uint64_t> first;                // where each begins; one more than there are sets
    std::vector<std::unique_ptr<Table>> tables; // by state: what follows each byte
    size_t n_tables = 0;
    std::unordered_set<State, Hash, Equal> known;
    std::unordered_map<uint64_t, State> united;
    uint64_t work = 0;

    static uint64_t key_of(uint32_t position, uint32_t detail) { return (uint64_t) position << 32 | detail; }
    const Entry * begin(State state) const { return entries.data() + first[state]; }
    size_t size_of(State state) const { return (size_t) (first[state + 1] - first[state]); }
    const Element & element(const Entry & entry) const { return rules->code[entry.key >> 32]; }

    void  spend(uint64_t n);
    State unite(State a, State b, int depth);
    State intern(const std::vector<Entry> & sorted);
    State normalise(std::vector<Entry> & list);
};

}  // namespace triollama::native

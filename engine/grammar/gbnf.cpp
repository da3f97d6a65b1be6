#include "grammar/gbnf.hpp"

#include "guards/errors.hpp"

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace triollama {

namespace {

constexpr int      max_parentheses   = 256;         // the parser recurses once a level
constexpr uint64_t max_repetitions   = 2000;        // llama.cpp's own limit, for the product of nested ones too
constexpr uint64_t max_elements      = 2000000;     // after repetitions are written out: 16 MB
constexpr int      max_rule_depth    = 1000;        // the check for left recursion recurses once a rule
constexpr uint64_t max_expansions    = 500000;      // ways to begin one rule: the matcher holds one stack for each

// A symbol of a rule, reduced to what matters here: a terminal, or a reference to a rule.
struct Symbol {
    bool     terminal;
    uint32_t rule;
};
using Sequence = std::vector<Symbol>;

struct Rule {
    std::string           name;
    bool                  defined = false;
    std::vector<Sequence> alternates;
    bool                  repeats = false;      // made for S* or S{m,}: R = S R | nothing
};

// A recursive-descent reader with llama.cpp's syntax, repetitions rewritten into rules as llama.cpp does:
//   S{m,n}: S m times, then R(n-m) with R(i) = S R(i-1) | nothing;   S{m,}: S m times, then R = S R | nothing.
class Reader {
public:
    Reader(const llama_vocab * vocab, const std::string & text) : vocab(vocab), text(text) {}

    std::vector<Rule> rules;
    std::map<std::string, uint32_t> ids;
    GrammarFacts facts;

    void read() {
        skip_space(true);
        while (at() != 0) {
            read_rule();
        }
    }

private:
    const llama_vocab * vocab;
    const std::string & text;
    size_t   pos      = 0;
    uint64_t elements = 0;

    char at(size_t ahead = 0) const { return pos + ahead < text.size() ? text[pos + ahead] : 0; }

    [[noreturn]] void fail(const std::string & what, size_t where) const {
        size_t line = 1;
        size_t column = 1;
        for (size_t i = 0; i < where && i < text.size(); ++i) {
            if (text[i] == '\n') {
                ++line;
                column = 1;
            } else if (((unsigned char) text[i] & 0xC0) != 0x80) {
                ++column;
            }
        }
        throw grammar_error("the grammar cannot be parsed: " + what + " at line " + std::to_string(line) +
                            ", column " + std::to_string(column));
    }
    [[noreturn]] void fail(const std::string & what) const { fail(what, pos); }

    static bool is_digit(char c) { return c >= '0' && c <= '9'; }
    static bool is_word(char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || is_digit(c);
    }

    void skip_space(bool newlines) {
        while (true) {
            const char c = at();
            if (c == '#') {
                while (at() != 0 && at() != '\r' && at() != '\n') {
                    ++pos;
                }
            } else if (c == ' ' || c == '\t' || (newlines && (c == '\r' || c == '\n'))) {
                ++pos;
            } else {
                return;
            }
        }
    }

    std::string read_name() {
        const size_t start = pos;
        while (is_word(at())) {
            ++pos;
        }
        if (pos == start) {
            fail("a rule's name (letters, digits and hyphens) is expected");
        }
        return text.substr(start, pos - start);
    }

    uint64_t read_number() {
        if (!is_digit(at())) {
            fail("a number is expected");
        }
        uint64_t value = 0;
        while (is_digit(at())) {
            value = std::min<uint64_t>(value * 10 + (uint64_t) (at() - '0'), UINT32_MAX + 1ull);
            ++pos;
        }
        return value;
    }

    void count_elements(uint64_t n) {
        elements += n;
        if (elements > max_elements) {
            fail("repetitions make the grammar too large (more than " + std::to_string(max_elements) + " elements)");
        }
    }

    void read_hex(int digits) {
        for (int i = 0; i < digits; ++i, ++pos) {
            const char c = at();
            if (!is_digit(c) && !(c >= 'a' && c <= 'f') && !(c >= 'A' && c <= 'F')) {
                fail(std::to_string(digits) + " hexadecimal digits are expected");
            }
        }
    }

    void read_char() {
        const char c = at();
        if (c == 0) {
            fail("the grammar ends inside a string or a set of characters");
        }
        ++pos;
        if (c == '\\') {
            const char escaped = at();
            ++pos;
            switch (escaped) {
                case 'x': read_hex(2); break;
                case 'u': read_hex(4); break;
                case 'U': read_hex(8); break;
                case 't': case 'r': case 'n': case '\\': case '"': case '[': case ']': case '-': break;
                default: fail("unknown escape", pos - 2);
            }
        } else {
            const auto byte = (unsigned char) c;
            const int follow = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : byte >= 0xC0 ? 1 : 0;
            for (int i = 0; i < follow && at() != 0; ++i) {
                ++pos;
            }
        }
        count_elements(1);
    }

    void read_token() {
        facts.names_tokens = true;
        const size_t start = pos;
        if (at() == '!') {
            ++pos;
        }
        const size_t open = pos;
        if (at() != '<') {
            fail("'<' is expected: a token is written <[id]> or <text>");
        }
        ++pos;
        if (at() == '[') {
            ++pos;
            const uint64_t id = read_number();
            if (id >= (uint64_t) llama_vocab_n_tokens(vocab)) {
                fail("token outside the vocabulary", start);
            }
            if (at() != ']' || at(1) != '>') {
                fail("']>' is expected");
            }
            pos += 2;
        } else {
            while (at() != 0 && at() != '>') {
                ++pos;
            }
            if (at() != '>') {
                fail("'>' is expected");
            }
            ++pos;
            llama_token tokens[2];
            const int32_t n = llama_tokenize(vocab, text.data() + open, (int32_t) (pos - open), tokens, 2, false, true);
            if (n != 1) {
                fail("'" + text.substr(open, pos - open) + "' is not one token of this vocabulary", start);
            }
        }
        count_elements(1);
    }

    uint32_t rule_id(const std::string & name) {
        const auto found = ids.emplace(name, (uint32_t) rules.size());
        if (found.second) {
            rules.push_back({ name, false, {}, false });
        }
        return found.first->second;
    }

    uint32_t new_rule(const std::string & base) {
        rules.push_back({ base, true, {}, false });
        return (uint32_t) rules.size() - 1;
    }

    // Repeats the end of the sequence from `item_start` on: so many elements, written out as so many rules (`weight`).
    void repeat(const std::string & name, Sequence & sequence, size_t item_start, uint64_t item_elements,
                uint64_t & weight, uint64_t least, uint64_t most, bool unbounded) {
        if (item_start == sequence.size()) {
            fail("there is nothing to repeat");
        }
        const uint64_t times = !unbounded && most > 0 ? most : std::max<uint64_t>(least, 1);
        if (least > max_repetitions || weight * times > max_repetitions) {
            fail("more than " + std::to_string(max_repetitions) + " repetitions, nested ones multiplied");
        }
        if (!unbounded && most < least) {
            fail("a repetition's upper bound is below its lower bound");
        }
        weight *= times;
        const Sequence item(sequence.begin() + (ptrdiff_t) item_start, sequence.end());
        const uint64_t optional = unbounded ? 1 : most - least;
        count_elements((item_elements + 4) * (least + optional));
        sequence.resize(item_start);
        for (uint64_t i = 0; i < least; ++i) {
            sequence.insert(sequence.end(), item.begin(), item.end());
        }
        uint32_t last = 0;
        for (uint64_t i = 0; i < optional; ++i) {
            const uint32_t id = new_rule(name);
            Sequence body(item);
            if (unbounded || i > 0) {
                body.push_back({ false, unbounded ? id : last });
            }
            rules[id].alternates = { std::move(body), {} };
            rules[id].repeats    = unbounded;
            last = id;
        }
        if (optional > 0) {
            sequence.push_back({ false, last });
        }
    }

    Sequence read_sequence(const std::string & name, int depth) {
        Sequence sequence;
        size_t   item          = 0;
        uint64_t item_elements = 0;
        uint64_t weight        = 1;
        while (true) {
            const char c = at();
            const uint64_t elements_before = elements;
            if (c == '"') {
                ++pos;
                item = sequence.size();
                const bool empty = at() == '"';
                while (at() != '"') {
                    read_char();
                }
                ++pos;
                if (!empty) {
                    sequence.push_back({ true, 0 });
                }
                weight = 1;
            } else if (c == '[') {
                ++pos;
                if (at() == '^') {
                    ++pos;
                }
                item = sequence.size();
                const bool empty = at() == ']';
                while (at() != ']') {
                    read_char();
                    if (at() == '-' && at(1) != ']') {
                        ++pos;
                        read_char();
                    }
                }
                ++pos;
                if (!empty) {
                    sequence.push_back({ true, 0 });
                }
                weight = 1;
            } else if (c == '<' || c == '!') {
                item = sequence.size();
                read_token();
                sequence.push_back({ true, 0 });
                weight = 1;
            } else if (c == '.') {
                ++pos;
                item = sequence.size();
                count_elements(1);
                sequence.push_back({ true, 0 });
                weight = 1;
            } else if (is_word(c)) {
                item = sequence.size();
                const uint32_t id = rule_id(read_name());
                count_elements(1);
                sequence.push_back({ false, id });
                weight = 1;
            } else if (c == '(') {
                if (depth >= max_parentheses) {
                    fail("parentheses are nested more than " + std::to_string(max_parentheses) + " deep");
                }
                ++pos;
                skip_space(true);
                const size_t rules_before = rules.size();
                const uint32_t id = new_rule(name);
                read_alternates(name, id, depth + 1);
                if (at() != ')') {
                    fail("')' is expected");
                }
                ++pos;
                weight = std::max<uint64_t>(1, rules.size() - rules_before);
                item = sequence.size();
                sequence.push_back({ false, id });
                count_elements(1);
                skip_space(depth > 0);
                item_elements = 1;
                continue;
            } else if (c == '*' || c == '+' || c == '?') {
                ++pos;
                repeat(name, sequence, item, item_elements, weight, c == '+' ? 1 : 0, 1, c != '?');
            } else if (c == '{') {
                ++pos;
                skip_space(depth > 0);
                const uint64_t least = read_number();
                uint64_t most = least;
                bool unbounded = false;
                skip_space(depth > 0);
                if (at() == ',') {
                    ++pos;
                    skip_space(depth > 0);
                    unbounded = !is_digit(at());
                    if (!unbounded) {
                        most = read_number();
                        unbounded = most > max_repetitions;     // as llama.cpp reads it
                        skip_space(depth > 0);
                    }
                }
                if (at() != '}') {
                    fail("'}' is expected");
                }
                ++pos;
                repeat(name, sequence, item, item_elements, weight, least, most, unbounded);
                skip_space(depth > 0);
                continue;
            } else {
                return sequence;
            }
            if (elements > elements_before && c != '*' && c != '+' && c != '?') {
                item_elements = elements - elements_before;
            }
            skip_space(depth > 0);
        }
    }

    void read_alternates(const std::string & name, uint32_t id, int depth) {
        std::vector<Sequence> alternates;
        alternates.push_back(read_sequence(name, depth));
        while (at() == '|') {
            ++pos;
            skip_space(true);
            alternates.push_back(read_sequence(name, depth));
        }
        count_elements(alternates.size());
        rules[id].alternates = std::move(alternates);
        rules[id].defined    = true;
    }

    void read_rule() {
        const std::string name = read_name();
        skip_space(false);
        const uint32_t id = rule_id(name);
        if (at() != ':' || at(1) != ':' || at(2) != '=') {
            fail("'::=' is expected");
        }
        pos += 3;
        skip_space(true);
        read_alternates(name, id, 0);
        if (at() == '\r') {
            pos += at(1) == '\n' ? 2 : 1;
        } else if (at() == '\n') {
            ++pos;
        } else if (at() != 0) {
            fail("the end of the rule is expected");
        }
        skip_space(true);
    }
};

// Which rules can match nothing. Every sequence counts its symbols that are not yet known to be nullable.
std::vector<char> find_nullable(const std::vector<Rule> & rules) {
    struct Pending {
        uint32_t rule;
        size_t   missing;
    };
    std::vector<Pending> sequences;
    std::vector<std::vector<size_t>> uses(rules.size());
    std::vector<char> nullable(rules.size(), 0);
    std::vector<uint32_t> todo;
    auto found = [&](uint32_t id) {
        if (!nullable[id]) {
            nullable[id] = 1;
            todo.push_back(id);
        }
    };
    for (uint32_t id = 0; id < rules.size(); ++id) {
        for (const Sequence & sequence : rules[id].alternates) {
            const bool has_terminal = std::any_of(sequence.begin(), sequence.end(), [](const Symbol & symbol) {
                return symbol.terminal;
            });
            if (has_terminal) {
                continue;
            }
            for (const Symbol & symbol : sequence) {
                uses[symbol.rule].push_back(sequences.size());
            }
            sequences.push_back({ id, sequence.size() });
            if (sequence.empty()) {
                found(id);
            }
        }
    }
    while (!todo.empty()) {
        const uint32_t id = todo.back();
        todo.pop_back();
        for (const size_t use : uses[id]) {
            if (--sequences[use].missing == 0) {
                found(sequences[use].rule);
            }
        }
    }
    return nullable;
}

// Follows every leftmost reference: finds left recursion, and bounds the depth and the number of expansions.
class LeftmostWalk {
public:
    LeftmostWalk(const std::vector<Rule> & rules, const std::vector<char> & nullable)
        : rules(rules), nullable(nullable), state(rules.size(), 0), expansions(rules.size(), 0), height(rules.size(), 0) {}

    void visit(uint32_t id, int depth) {
        if (depth > max_rule_depth) {
            throw grammar_error("the grammar's rules begin with one another more than " +
                                std::to_string(max_rule_depth) + " deep");
        }
        state[id] = 1;
        uint64_t total = 1;
        int      tall  = 0;
        for (const Sequence & sequence : rules[id].alternates) {
            for (size_t i = 0; i < sequence.size(); ++i) {
                const Symbol & symbol = sequence[i];
                if (symbol.terminal) {
                    ++total;
                    break;
                }
                if (rules[id].repeats && symbol.rule == id) {
                    break;      // what is repeated can be empty; the reference is last, so the matcher's stack cannot grow
                }
                if (state[symbol.rule] == 1) {
                    throw grammar_error("the grammar is left-recursive: rule '" + rules[symbol.rule].name +
                                        "' can begin with itself; write it with repetition (x* or x+) instead");
                }
                if (state[symbol.rule] == 0) {
                    visit(symbol.rule, depth + 1);
                }
                total += expansions[symbol.rule];
                tall = std::max(tall, height[symbol.rule]);
                if (!nullable[symbol.rule]) {
                    break;
                }
            }
            if (total > max_expansions) {
                throw grammar_error("the grammar is too ambiguous: rule '" + rules[id].name + "' can begin in more than " +
                                    std::to_string(max_expansions) + " ways");
            }
        }
        expansions[id] = total;
        height[id]     = tall + 1;
        if (depth + tall > max_rule_depth) {
            throw grammar_error("the grammar's rules begin with one another more than " +
                                std::to_string(max_rule_depth) + " deep");
        }
        state[id] = 2;
    }

    bool visited(uint32_t id) const { return state[id] != 0; }

private:
    const std::vector<Rule> & rules;
    const std::vector<char> & nullable;
    std::vector<char>     state;        // 0: not seen, 1: being followed, 2: done
    std::vector<uint64_t> expansions;
    std::vector<int>      height;
};

}  // namespace

GrammarFacts check_gbnf(const llama_vocab * vocab, const std::string & grammar, const std::string & root) {
    if (grammar.find('\0') != std::string::npos || root.find('\0') != std::string::npos) {
        throw grammar_error("the grammar holds a NUL character");
    }
    Reader reader(vocab, grammar);
    reader.read();
    if (reader.rules.empty()) {
        throw grammar_error("the grammar has no rules");
    }
    for (const auto & entry : reader.ids) {
        if (!reader.rules[entry.second].defined) {
            throw grammar_error("the grammar uses rule '" + entry.first + "' without defining it");
        }
    }
    if (reader.ids.find(root) == reader.ids.end()) {
        throw grammar_error("the grammar has no rule '" + root + "' to begin with");
    }
    const std::vector<char> nullable = find_nullable(reader.rules);
    LeftmostWalk walk(reader.rules, nullable);
    for (uint32_t id = 0; id < reader.rules.size(); ++id) {
        if (!walk.visited(id)) {
            walk.visit(id, 1);
        }
    }
    return reader.facts;
}

}  // namespace triollama

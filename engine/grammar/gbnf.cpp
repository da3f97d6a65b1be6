#include "grammar/gbnf.hpp"

#include "grammar/byte_sets.hpp"
#include "guards/errors.hpp"
#include "text/tokenize.hpp"

#include <algorithm>
#include <map>

namespace triollama::native {

namespace {

constexpr int      max_parentheses = 256;           // the reader recurses once a level
constexpr uint64_t max_elements    = 2000000;       // with repetitions written out

using Sequence = std::vector<Element>;

struct ReadRule {
    std::string           name;
    bool                  defined = false;
    std::vector<Sequence> alternates;
};

// A recursive-descent reader with llama.cpp's syntax. Repetitions become rules:
//   S{m,n}: S m times, then R(n-m) with R(i) = S R(i-1) | nothing;   S{m,}: S m times, then R = S R | nothing.
class GrammarReader {
public:
    GrammarReader(const llama_vocab * vocab, const std::string & text, std::vector<ByteNode> & nodes)
        : vocab(vocab), text(text), sets(nodes) {}

    std::vector<ReadRule> rules;
    std::map<std::string, uint32_t> ids;

    void read() {
        skip_space(true);
        while (at() != 0) {
            read_rule();
        }
    }

private:
    const llama_vocab * vocab;
    const std::string & text;
    ByteSets sets;
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
            fail("the grammar is too large: with its repetitions written out it has more than " +
                 std::to_string(max_elements) + " elements");
        }
    }

    uint32_t read_hex(int digits) {
        uint32_t value = 0;
        for (int i = 0; i < digits; ++i, ++pos) {
            const char c = at();
            if (!is_digit(c) && !(c >= 'a' && c <= 'f') && !(c >= 'A' && c <= 'F')) {
                fail(std::to_string(digits) + " hexadecimal digits are expected");
            }
            value = value << 4 | (uint32_t) (is_digit(c) ? c - '0' : (c | 32) - 'a' + 10);
        }
        return value;
    }

    uint32_t read_char() {
        const auto byte = (unsigned char) at();
        if (byte == 0) {
            fail("the grammar ends inside a string or a set of characters");
        }
        count_elements(1);
        ++pos;
        if (byte == '\\') {
            const char escaped = at();
            ++pos;
            switch (escaped) {
                case 'x': return read_hex(2);
                case 'u': return read_hex(4);
                case 'U': return read_hex(8);
                case 't': return '\t';
                case 'r': return '\r';
                case 'n': return '\n';
                case '\\': case '"': case '[': case ']': case '-': return (unsigned char) escaped;
                default: fail("unknown escape", pos - 2);
            }
        }
        const int follow = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : byte >= 0xC0 ? 1 : 0;
        uint32_t value = follow == 0 ? byte : byte & (0x3Fu >> follow);
        for (int i = 0; i < follow && at() != 0; ++i, ++pos) {
            value = value << 6 | ((unsigned char) at() & 0x3F);
        }
        return value;
    }

    Element read_string_char() {
        const uint32_t c = read_char();
        return { Element::bytes, sets.node_of({ { c, c } }, false) };
    }

    void read_set(Sequence & sequence) {
        ++pos;
        const bool negated = at() == '^';
        pos += negated;
        CharRanges ranges;
        while (at() != ']') {
            const uint32_t first = read_char();
            uint32_t last = first;
            if (at() == '-' && at(1) != ']') {
                ++pos;
                last = read_char();
            }
            ranges.emplace_back(first, last);
        }
        ++pos;
        if (!ranges.empty()) {          // [] and [^] are nothing to llama.cpp
            sequence.push_back({ Element::bytes, sets.node_of(ranges, negated) });
        }
    }

    Element read_token() {
        const size_t start = pos;
        const auto kind = at() == '!' ? Element::other_token : Element::token;
        pos += kind == Element::other_token;
        const size_t open = pos;
        if (at() != '<') {
            fail("'<' is expected: a token is written <[id]> or <text>");
        }
        ++pos;
        llama_token id;
        if (at() == '[') {
            ++pos;
            const uint64_t number = read_number();
            if (number >= (uint64_t) llama_vocab_n_tokens(vocab)) {
                fail("token outside the vocabulary", start);
            }
            if (at() != ']' || at(1) != '>') {
                fail("']>' is expected");
            }
            pos += 2;
            id = (llama_token) number;
        } else {
            while (at() != 0 && at() != '>') {
                ++pos;
            }
            if (at() != '>') {
                fail("'>' is expected");
            }
            ++pos;
            id = single_token(vocab, text.substr(open, pos - open));
            if (id == LLAMA_TOKEN_NULL) {
                fail("'" + text.substr(open, std::min<size_t>(pos - open, 100)) + "' is not one token of this vocabulary", start);
            }
        }
        if (kind == Element::token && llama_vocab_is_eog(vocab, id)) {
            fail("token " + std::to_string(id) + " ends a generation, as the end of the grammar does without naming it", start);
        }
        count_elements(1);
        return { kind, (uint32_t) id };
    }

    uint32_t rule_id(const std::string & name) {
        const auto found = ids.emplace(name, (uint32_t) rules.size());
        if (found.second) {
            rules.push_back({ name, false, {} });
        }
        return found.first->second;
    }

    uint32_t new_rule(const std::string & name) {
        rules.push_back({ name, true, {} });
        return (uint32_t) rules.size() - 1;
    }

    // Repeats the end of the sequence from `start` on.
    void repeat(const std::string & name, Sequence & sequence, size_t start, uint64_t least, uint64_t most, bool unbounded) {
        if (start == sequence.size()) {
            fail("there is nothing to repeat");
        }
        if (!unbounded && most < least) {
            fail("a repetition's upper bound is below its lower bound");
        }
        const uint64_t optional = unbounded ? 1 : most - least;
        count_elements(least + 8 * optional);       // a rule weighs more than an element
        Element item = sequence[start];
        if (sequence.size() - start > 1) {
            item = { Element::rule, new_rule(name) };
            rules[item.value].alternates = { Sequence(sequence.begin() + (ptrdiff_t) start, sequence.end()) };
        }
        sequence.resize(start);
        sequence.insert(sequence.end(), (size_t) least, item);
        uint32_t last = 0;
        for (uint64_t i = 0; i < optional; ++i) {
            const uint32_t id = new_rule(name);
            Sequence body = { item };
            if (unbounded || i > 0) {
                body.push_back({ Element::rule, unbounded ? id : last });
            }
            rules[id].alternates = { std::move(body), {} };
            last = id;
        }
        if (optional > 0) {
            sequence.push_back({ Element::rule, last });
        }
    }

    void read_bounds(const std::string & name, Sequence & sequence, size_t start, bool newlines) {
        ++pos;
        skip_space(newlines);
        const uint64_t least = read_number();
        uint64_t most = least;
        bool unbounded = false;
        skip_space(newlines);
        if (at() == ',') {
            ++pos;
            skip_space(newlines);
            unbounded = !is_digit(at());
            if (!unbounded) {
                most = read_number();
                skip_space(newlines);
            }
        }
        if (at() != '}') {
            fail("'}' is expected");
        }
        ++pos;
        repeat(name, sequence, start, least, most, unbounded);
    }

    Sequence read_sequence(const std::string & name, int depth) {
        Sequence sequence;
        size_t item = 0;        // where what a repetition repeats begins
        while (true) {
            const char c = at();
            if (c == '*' || c == '+' || c == '?') {
                ++pos;
                repeat(name, sequence, item, c == '+' ? 1 : 0, 1, c != '?');
            } else if (c == '{') {
                read_bounds(name, sequence, item, depth > 0);
            } else {
                const size_t next = sequence.size();
                if (c == '"') {
                    ++pos;
                    while (at() != '"') {
                        sequence.push_back(read_string_char());
                    }
                    ++pos;
                } else if (c == '[') {
                    read_set(sequence);
                } else if (c == '.') {
                    ++pos;
                    sequence.push_back({ Element::bytes, sets.node_of({}, true) });
                } else if (c == '<' || c == '!') {
                    sequence.push_back(read_token());
                } else if (is_word(c)) {
                    sequence.push_back({ Element::rule, rule_id(read_name()) });
                } else if (c == '(') {
                    sequence.push_back(read_group(name, depth));
                } else {
                    return sequence;
                }
                count_elements(1);
                item = next;
            }
            skip_space(depth > 0);
        }
    }

    Element read_group(const std::string & name, int depth) {
        if (depth >= max_parentheses) {
            fail("parentheses are nested more than " + std::to_string(max_parentheses) + " deep");
        }
        ++pos;
        skip_space(true);
        const uint32_t id = new_rule(name);
        read_alternates(name, id, depth + 1);
        if (at() != ')') {
            fail("')' is expected");
        }
        ++pos;
        return { Element::rule, id };
    }

    void read_alternates(const std::string & name, uint32_t id, int depth) {
        std::vector<Sequence> alternates;
        alternates.push_back(read_sequence(name, depth));
        while (at() == '|') {
            ++pos;
            skip_space(true);
            alternates.push_back(read_sequence(name, depth));
            count_elements(1);
        }
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

// The rules that have an alternate of nothing but good terminals and good rules: the least such set.
template <typename Good> std::vector<char> saturate(const std::vector<ReadRule> & rules, const Good & is_good) {
    struct Pending {
        uint32_t rule;
        size_t   missing;
    };
    std::vector<Pending> sequences;
    std::vector<std::vector<size_t>> uses(rules.size());
    std::vector<char> good(rules.size(), 0);
    std::vector<uint32_t> todo;
    auto found = [&](uint32_t id) {
        if (!good[id]) {
            good[id] = 1;
            todo.push_back(id);
        }
    };
    for (uint32_t id = 0; id < rules.size(); ++id) {
        for (const Sequence & sequence : rules[id].alternates) {
            if (!std::all_of(sequence.begin(), sequence.end(), [&](const Element & element) {
                    return element.kind == Element::rule || is_good(element);
                })) {
                continue;
            }
            Pending pending = { id, 0 };
            for (const Element & element : sequence) {
                if (element.kind == Element::rule) {
                    uses[element.value].push_back(sequences.size());
                    ++pending.missing;
                }
            }
            sequences.push_back(pending);
            if (pending.missing == 0) {
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
    return good;
}

// Drops what can match no text, so that whatever is allowed can be gone on with.
void drop_impossible(std::vector<ReadRule> & rules, const std::vector<ByteNode> & nodes) {
    const std::vector<char> possible = saturate(rules, [&](const Element & element) {
        return element.kind != Element::bytes || !nodes[element.value].empty();
    });
    for (ReadRule & rule : rules) {
        auto & alternates = rule.alternates;
        alternates.erase(std::remove_if(alternates.begin(), alternates.end(), [&](const Sequence & sequence) {
            return std::any_of(sequence.begin(), sequence.end(), [&](const Element & element) {
                return element.kind == Element::rule  ? !possible[element.value] :
                       element.kind == Element::bytes && nodes[element.value].empty();
            });
        }), alternates.end());
    }
}

// Orders the rules so that each comes before those that it can begin with. A rule that ends with itself after nothing, as
// that of (x?)* does, begins with itself harmlessly.
void rank(const std::vector<ReadRule> & read, Rules & rules) {
    std::vector<std::vector<uint32_t>> begins(read.size());
    std::vector<uint32_t> users(read.size(), 0);
    for (uint32_t id = 0; id < read.size(); ++id) {
        for (const Sequence & sequence : read[id].alternates) {
            for (size_t i = 0; i < sequence.size() && sequence[i].kind == Element::rule; ++i) {
                const uint32_t other = sequence[i].value;
                if (other != id || i == 0 || i + 1 < sequence.size()) {
                    begins[id].push_back(other);
                    ++users[other];
                }
                if (!rules.rules[other].nullable) {
                    break;
                }
            }
        }
    }
    for (uint32_t id = 0; id < read.size(); ++id) {
        if (users[id] == 0) {
            rules.by_rank.push_back(id);
        }
    }
    for (size_t i = 0; i < rules.by_rank.size(); ++i) {
        rules.rules[rules.by_rank[i]].rank = (uint32_t) i;
        for (const uint32_t other : begins[rules.by_rank[i]]) {
            if (--users[other] == 0) {
                rules.by_rank.push_back(other);
            }
        }
    }
    if (rules.by_rank.size() < read.size()) {
        const auto cycle = std::find_if(users.begin(), users.end(), [](uint32_t n) { return n > 0; }) - users.begin();
        throw grammar_error("the grammar is left-recursive: rule '" + read[(size_t) cycle].name +
                            "', or one that it uses, can begin with itself");
    }
}

}  // namespace

std::shared_ptr<const Rules> read_gbnf(const llama_vocab * vocab, const std::string & grammar, const std::string & root) {
    if (grammar.find('\0') != std::string::npos || root.find('\0') != std::string::npos) {
        throw grammar_error("the grammar holds a NUL character");
    }
    auto rules = std::make_shared<Rules>();
    GrammarReader reader(vocab, grammar, rules->nodes);
    reader.read();
    std::vector<ReadRule> & read = reader.rules;
    if (read.empty()) {
        throw grammar_error("the grammar has no rules");
    }
    for (const auto & entry : reader.ids) {
        if (!read[entry.second].defined) {
            throw grammar_error("the grammar uses rule '" + entry.first + "' without defining it");
        }
    }
    const auto found = reader.ids.find(root);
    if (found == reader.ids.end()) {
        throw grammar_error("the grammar has no rule '" + root + "' to begin with");
    }
    rules->root = found->second;
    drop_impossible(read, rules->nodes);
    if (read[rules->root].alternates.empty()) {
        throw grammar_error("the grammar matches no text: rule '" + root + "' never comes to an end, or needs a character "
                            "that does not exist");
    }
    const std::vector<char> nullable = saturate(read, [](const Element &) { return false; });
    rules->code.push_back({ Element::end, 0 });
    for (size_t id = 0; id < read.size(); ++id) {
        rules->rules.push_back({ (uint32_t) rules->starts.size(), (uint32_t) read[id].alternates.size(), 0, nullable[id] != 0 });
        for (const Sequence & sequence : read[id].alternates) {
            rules->starts.push_back((uint32_t) rules->code.size());
            rules->code.insert(rules->code.end(), sequence.begin(), sequence.end());
            rules->code.push_back({ Element::end, 0 });
        }
    }
    rank(read, *rules);
    return rules;
}

}  // namespace triollama::native

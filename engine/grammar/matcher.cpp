#include "grammar/matcher.hpp"

#include "guards/errors.hpp"

#include <algorithm>
#include <map>

namespace triollama::native {

namespace {

constexpr uint64_t least_budget = 5000000;      // steps of work in one call: tenths of a second
constexpr uint64_t for_each     = 32;           // and so many for each element of the grammar
constexpr int      max_uniting  = 1000;         // unite recurses once for each rest
constexpr uint32_t unknown      = UINT32_MAX;

}  // namespace

// Runs what may come next until each way of reading needs a byte or a token. Rules are expanded in the order of their rank,
// each once, after everything that can begin with them has said how it goes on.
class Matcher::Closure {
public:
    explicit Closure(Matcher & matcher) : matcher(matcher), rules(*matcher.rules) {}

    void add(uint64_t key, State rest) { out.push_back({ key, rest }); }

    // What stands at a position, then the rest. `returns`: at the end of its sequence the rest goes on; within a rule that
    // is being expanded it does not, since whoever refers to a rule that may be nothing has stepped over it already.
    void run(uint32_t position, State rest, bool returns = true) {
        for (;; ++position) {
            matcher.spend(1);
            const Element & element = rules.code[position];
            if (element.kind == Element::end) {
                if (returns && returned.insert(rest).second) {
                    returning.push_back(rest);
                }
                return;
            }
            if (element.kind != Element::rule) {
                out.push_back({ key_of(position, element.kind == Element::bytes ? element.value : 0), rest });
                return;
            }
            refer(element.value, position + 1, rest);
            if (!rules.rules[element.value].nullable) {
                return;
            }
        }
    }

    void expand(uint32_t rule, State rest) {
        const Rules::Rule & r = rules.rules[rule];
        expanding = rule;
        expanding_rest = rest;
        matcher.spend(r.count);
        for (uint32_t i = 0; i < r.count; ++i) {
            run(rules.starts[r.first + i], rest, false);
        }
    }

    State finish() {
        while (!returning.empty()) {
            const State rest = returning.back();
            returning.pop_back();
            for (size_t i = 0; i < matcher.size_of(rest); ++i) {
                const Entry entry = matcher.begin(rest)[i];
                if (entry.key == 0) {
                    out.push_back(entry);
                } else {
                    run((uint32_t) (entry.key >> 32), entry.rest);
                }
            }
        }
        while (!waiting.empty()) {
            auto node = waiting.extract(waiting.begin());
            expand(rules.by_rank[node.key()], matcher.normalise(node.mapped()));
        }
        return matcher.normalise(out);
    }

private:
    Matcher & matcher;
    const Rules & rules;
    std::vector<Entry> out;
    std::vector<State> returning;                       // what stands below a sequence that has come to its end
    std::unordered_set<State> returned;
    std::map<uint32_t, std::vector<Entry>> waiting;     // rule, by rank: what comes after it
    uint32_t expanding = unknown;
    State    expanding_rest = nothing;

    void refer(uint32_t rule, uint32_t after, State rest) {
        const bool last = rules.code[after].kind == Element::end;
        if (last && rule == expanding && rest == expanding_rest) {
            return;         // (x?)* after nothing: this is being done
        }
        std::vector<Entry> & follow = waiting[rules.rules[rule].rank];
        if (last) {
            const size_t n = matcher.size_of(rest);
            matcher.spend(n);
            follow.insert(follow.end(), matcher.begin(rest), matcher.begin(rest) + n);
        } else {
            follow.push_back({ key_of(after, 0), rest });
        }
    }
};

size_t Matcher::Hash::operator()(State state) const {
    uint64_t value = 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < matcher->size_of(state); ++i) {
        const Entry & entry = matcher->begin(state)[i];
        value = (value ^ entry.key) * 0xff51afd7ed558ccdull;
        value = (value ^ value >> 32 ^ entry.rest) * 0xc4ceb9fe1a85ec53ull;
        value ^= value >> 29;
    }
    return (size_t) value;
}

bool Matcher::Equal::operator()(State a, State b) const {
    return matcher->size_of(a) == matcher->size_of(b) &&
           std::equal(matcher->begin(a), matcher->begin(a) + matcher->size_of(a), matcher->begin(b));
}

Matcher::Matcher(std::shared_ptr<const Rules> rules)
    : rules(std::move(rules)), budget(least_budget + for_each * this->rules->code.size()), first{ 0 }, known(64, Hash{ this }, Equal{ this }) {
    intern({});             // nothing
}

std::unique_ptr<Matcher> Matcher::copy(State & state) const {
    auto result = std::make_unique<Matcher>(rules);
    std::vector<char> needed(state + 1, 0);
    needed[state] = 1;
    for (State id = state + 1; id-- > 1;) {
        for (size_t i = 0; needed[id] && i < size_of(id); ++i) {
            needed[begin(id)[i].rest] = 1;
        }
    }
    std::vector<State> names(state + 1, nothing);
    std::vector<Entry> renamed;
    for (State id = 1; id <= state; ++id) {
        if (needed[id]) {
            renamed.assign(begin(id), begin(id) + size_of(id));
            for (Entry & entry : renamed) {
                entry.rest = names[entry.rest];
            }
            names[id] = result->intern(renamed);
            result->renew_budget();
        }
    }
    state = names[state];
    return result;
}

void Matcher::spend(uint64_t n) {
    work += n;
    if (work > budget) {
        throw grammar_error("the grammar is too ambiguous: there are too many ways of reading the text so far; "
                            "look for repetitions within repetitions of what may look the same");
    }
}

// Adds a set, or finds it.
Matcher::State Matcher::intern(const std::vector<Entry> & sorted) {
    spend(sorted.size());
    const auto state = (State) (first.size() - 1);
    entries.insert(entries.end(), sorted.begin(), sorted.end());
    first.push_back(entries.size());
    const auto found = known.insert(state);
    if (!found.second) {
        first.pop_back();
        entries.resize(first.back());
    }
    return *found.first;
}

// The set of a list of entries, those with the same top united.
Matcher::State Matcher::normalise(std::vector<Entry> & list) {
    std::sort(list.begin(), list.end());
    size_t n = 0;
    for (size_t i = 0; i < list.size(); ++i) {
        if (n > 0 && list[n - 1].key == list[i].key) {
            list[n - 1].rest = unite(list[n - 1].rest, list[i].rest, 0);
        } else {
            list[n++] = list[i];
        }
    }
    list.resize(n);
    return intern(list);
}

Matcher::State Matcher::unite(State a, State b, int depth) {
    if (a == b || b == nothing) {
        return a;
    }
    if (a == nothing) {
        return b;
    }
    if (a > b) {
        std::swap(a, b);
    }
    const uint64_t pair = (uint64_t) a << 32 | b;
    const auto found = united.find(pair);
    if (found != united.end()) {
        return found->second;
    }
    if (depth > max_uniting) {
        throw grammar_error("the grammar is too ambiguous: ways of reading the text differ more than " +
                            std::to_string(max_uniting) + " levels deep");
    }
    std::vector<Entry> both;
    both.reserve(size_of(a) + size_of(b));
    size_t i = 0;
    size_t j = 0;
    while (i < size_of(a) || j < size_of(b)) {
        if (j == size_of(b) || (i < size_of(a) && begin(a)[i].key < begin(b)[j].key)) {
            both.push_back(begin(a)[i++]);
        } else if (i == size_of(a) || begin(b)[j].key < begin(a)[i].key) {
            both.push_back(begin(b)[j++]);
        } else {
            const uint64_t key = begin(a)[i].key;
            const State rest = unite(begin(a)[i].rest, begin(b)[j].rest, depth + 1);
            both.push_back({ key, rest });
            ++i;
            ++j;
        }
    }
    const State state = intern(both);
    united.emplace(pair, state);
    return state;
}

Matcher::State Matcher::start() {
    Closure closure(*this);
    closure.expand(rules->root, intern({ { 0, nothing } }));
    if (rules->rules[rules->root].nullable) {
        closure.add(0, nothing);
    }
    return closure.finish();
}

Matcher::State Matcher::after_byte(State state, unsigned char byte) {
    if (tables.size() <= state) {
        tables.resize(first.size());
    }
    if (!tables[state]) {
        tables[state] = std::make_unique<Table>();
        tables[state]->fill(unknown);
        ++n_tables;
    }
    State next = (*tables[state])[byte];
    if (next != unknown) {
        return next;
    }
    Closure closure(*this);
    spend(size_of(state));
    for (size_t i = 0; i < size_of(state); ++i) {
        const Entry entry = begin(state)[i];
        if (element(entry).kind != Element::bytes) {
            continue;
        }
        for (const ByteRange & range : rules->nodes[(uint32_t) entry.key]) {
            if (range.low <= byte && byte <= range.high) {
                const auto position = (uint32_t) (entry.key >> 32);
                if (range.next != 0) {
                    closure.add(key_of(position, range.next), entry.rest);
                } else {
                    closure.run(position + 1, entry.rest);
                }
            }
        }
    }
    next = closure.finish();
    (*tables[state])[byte] = next;
    return next;
}

namespace {

bool names(const Element & element, llama_token token) {
    return element.kind == Element::token       ? element.value == (uint32_t) token :
           element.kind == Element::other_token && element.value != (uint32_t) token;
}

}  // namespace

Matcher::State Matcher::after_token(State state, llama_token token) {
    Closure closure(*this);
    spend(size_of(state));
    for (size_t i = 0; i < size_of(state); ++i) {
        const Entry entry = begin(state)[i];
        if (names(element(entry), token)) {
            closure.run((uint32_t) (entry.key >> 32) + 1, entry.rest);
        }
    }
    return closure.finish();
}

bool Matcher::takes_token(State state, llama_token token) const {
    return std::any_of(begin(state), begin(state) + size_of(state), [&](const Entry & entry) {
        return names(element(entry), token);
    });
}

bool Matcher::names_tokens(State state) const {
    return std::any_of(begin(state), begin(state) + size_of(state), [&](const Entry & entry) {
        const Element::Kind kind = element(entry).kind;
        return kind == Element::token || kind == Element::other_token;
    });
}

}  // namespace triollama::native

"""The native decoder, as engine/decoding/decoder.hpp declares it."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

cimport llama
cimport sampling


cdef extern from "decoding/backend.hpp" namespace "triollama::native" nogil:
    cdef cppclass ContextSet:
        vector[llama.llama_adapter_lora *] adapters
        vector[float] scales
        vector[float] control
        vector[llama.llama_token] invocation
        int32_t control_first
        int32_t control_last


cdef extern from "decoding/slots.hpp" namespace "triollama::native" nogil:
    const int32_t WORTH_SHARING


cdef extern from "decoding/stream.hpp" namespace "triollama::native" nogil:
    cdef cppclass TokenScore:
        float logprob
        vector[sampling.TokenLogprob] top

    cdef cppclass Piece:
        string text
        vector[llama.llama_token] tokens
        vector[TokenScore] scores
        int64_t time_ns

    cdef enum class Kind(int32_t):
        generate
        score
        embed

    cdef enum class Pooling(int32_t):
        mean
        first
        last

    cdef enum class Finish(int32_t):
        none
        eos
        stop
        length
        context
        done
        cancelled
        error

    cdef enum class Failure(int32_t):
        none
        decode
        grammar
        sampler
        context_full
        memory
        adapter
        engine

    cdef cppclass Usage:
        int32_t prompt
        int32_t cached
        int32_t generated
        int64_t submitted_ns
        int64_t admitted_ns
        int64_t first_ns
        int64_t last_ns
        int64_t finished_ns

    cdef cppclass Request:
        Kind kind
        vector[llama.llama_token] tokens
        int32_t cached
        int32_t commit
        cpp_bool keep_on_cancel
        uint64_t sequence
        unique_ptr[sampling.Sampler] sampler
        int32_t accept_from
        vector[string] stops
        vector[llama.llama_token] end_tokens
        vector[llama.llama_token] stop_tokens
        int32_t max_tokens
        int32_t logprobs
        cpp_bool special
        cpp_bool shift
        int32_t n_keep
        cpp_bool hidden
        cpp_bool causal
        Pooling pooling
        int32_t given
        int32_t threads
        int32_t threads_batch
        uint64_t set
        int32_t priority
        int32_t capacity

    cdef cppclass Stream:
        const uint64_t id
        Finish finish()
        Failure failure
        string message
        int32_t stop_index
        llama.llama_token end_token
        int32_t position
        int32_t shifted
        vector[int32_t] shifts
        vector[float] values
        Usage usage()
        size_t waiting()
        sampling.Sampler * sampler()


cdef extern from "decoding/decoder.hpp" namespace "triollama::native" nogil:
    cdef enum class Packing(int32_t):
        mixed
        equal

    cdef cppclass DecoderConfig:
        Packing packing
        int32_t n_slots
        int32_t n_ubatch
        int32_t n_outputs
        int32_t n_ctx
        int32_t n_swa
        cpp_bool unified
        cpp_bool exact
        cpp_bool can_shift
        cpp_bool can_roll_back
        double prompt_budget
        int32_t prompt_tokens
        int32_t check_span
        cpp_bool spares
        int32_t max_queue
        int32_t set_steps
        size_t host_bytes
        int disk_fd
        size_t disk_bytes
        double restore_byte_s
        double prompt_token_s
        cpp_bool stepwise
        double slow_sampler_s
        int32_t n_helpers

    cdef cppclass Statistics:
        int32_t running
        int32_t prefilling
        int32_t parked
        int32_t queued
        int32_t sequences
        int32_t slots_free
        int64_t cells_used
        int64_t host_bytes
        int64_t disk_bytes
        int64_t finished
        int64_t cancelled
        int64_t failed
        int64_t prompt_tokens
        int64_t cached_tokens
        int64_t generated_tokens
        int64_t steps
        int64_t aborts
        int64_t evictions
        int64_t restores
        int64_t recomputes
        int64_t spills
        int64_t disk_failures
        int64_t preemptions
        int64_t set_changes
        int64_t slow_samples
        vector[double] first_token_s

    cdef cppclass Reply:
        const uint64_t id
        cpp_bool is_done()
        cpp_bool ok
        cpp_bool engine_failed
        string message
        string bytes
        int64_t value


# Its exceptions become Python's in raise.hpp.
cdef extern from "decoding/raise.hpp" namespace "triollama::native":
    int raise_decoder_error() except *


cdef extern from "decoding/raise.hpp" namespace "triollama::native" nogil:
    cdef cppclass Decoder:
        int fd()
        void poll(vector[uint64_t] & ids) except +raise_decoder_error
        shared_ptr[Stream] submit(Request request) except +raise_decoder_error
        cpp_bool take(Stream & stream, Piece & out) except +raise_decoder_error
        void cancel(Stream & stream)
        void cancel_at(const shared_ptr[Stream] & stream, int64_t n) except +raise_decoder_error
        void fail_at(int64_t n) except +raise_decoder_error
        void set_priority(const shared_ptr[Stream] & stream, int32_t priority) except +raise_decoder_error
        uint64_t make_sequence() except +raise_decoder_error
        void drop_sequence(uint64_t sequence) except +raise_decoder_error
        shared_ptr[Reply] fork_sequence(uint64_t a, uint64_t b, int32_t n) except +raise_decoder_error
        shared_ptr[Reply] save_sequence(uint64_t sequence) except +raise_decoder_error
        shared_ptr[Reply] load_sequence(
            uint64_t sequence, const uint8_t * data, size_t size, int32_t n,
            uint64_t set) except +raise_decoder_error
        shared_ptr[Reply] shift_sequence(
            uint64_t sequence, int32_t keep, int32_t drop) except +raise_decoder_error
        shared_ptr[Reply] query_sequence(uint64_t sequence) except +raise_decoder_error
        shared_ptr[Reply] define_set(uint64_t set, ContextSet context_set) except +raise_decoder_error
        shared_ptr[Reply] drop_set(uint64_t set) except +raise_decoder_error
        shared_ptr[Reply] step(int32_t n) except +raise_decoder_error
        Statistics statistics() except +raise_decoder_error
        void close()
        cpp_bool closed()
        string cause_of_death() except +raise_decoder_error

    shared_ptr[Decoder] open_decoder(
        llama.llama_context * ctx, const DecoderConfig & config) except +raise_decoder_error
    void leak_decoder(shared_ptr[Decoder] & decoder)
    void update_stream(Decoder & decoder, const shared_ptr[Stream] & stream, int32_t max_tokens,
                       const sampling.SamplingParams * sampling) except +raise_decoder_error


cdef extern from "decoding/adapters.hpp" namespace "triollama::native" nogil:
    shared_ptr[Reply] open_adapter_between_steps(
        Decoder & decoder, llama.llama_model * model, const string & path) except +raise_decoder_error
    shared_ptr[Reply] free_adapter_between_steps(
        Decoder & decoder, const llama.llama_model * model,
        llama.llama_adapter_lora * adapter) except +raise_decoder_error

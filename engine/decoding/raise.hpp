// The decoder's exceptions as Python's, and the calls that Cython cannot spell.
#pragma once

#include "decoding/decoder.hpp"
#include "guards/raise.hpp"

#include <memory>
#include <utility>

namespace triollama::native {

// The handler of `except +raise_decoder_error`. Called with the GIL, inside the catch block.
inline int raise_decoder_error() {
    try {
        throw;
    } catch (const queue_full_error & e) {
        raise_typed("QueueFullError", e.what());
    } catch (const decoder_closed_error & e) {
        raise_typed("ClosedError", e.what());
    } catch (const decoder_dead_error & e) {
        raise_typed("EngineError", e.what());
    } catch (const prompt_too_long_error & e) {
        raise_typed("ContextFullError", e.what());
    } catch (...) {
        raise_native_error();
    }
    return -1;
}

// Shared with the calls that do without the GIL, so that another thread may close it meanwhile.
inline std::shared_ptr<Decoder> open_decoder(llama_context * ctx, const DecoderConfig & config) {
    return std::make_shared<Decoder>(std::make_unique<LlamaBackend>(ctx, config.exact), config);
}

// After a fork its thread does not exist, and joining it would never end.
inline void leak_decoder(std::shared_ptr<Decoder> & decoder) { new std::shared_ptr<Decoder>(std::move(decoder)); }

// max_tokens -2 and sampling null: leave as it is.
inline void update_stream(Decoder & decoder, const StreamPtr & stream, int32_t max_tokens, const SamplingParams * sampling) {
    Update update;
    if (max_tokens != -2) {
        update.max_tokens = max_tokens;
    }
    if (sampling) {
        update.sampling = *sampling;
    }
    decoder.update(stream, std::move(update));
}

}  // namespace triollama::native

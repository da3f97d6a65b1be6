// The decoder's exceptions as Python's, and the two calls that Cython cannot spell.
#pragma once

#include "decoding/decoder.hpp"
#include "guards/raise.hpp"

namespace triollama {

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

inline Decoder * open_decoder(llama_context * ctx, const DecoderConfig & config) {
    return new Decoder(std::make_unique<LlamaBackend>(ctx), config);
}

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

}  // namespace triollama

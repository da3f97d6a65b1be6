// llama_model_quantize, made safe: what it asserts or divides by throws, and what it wrote is looked at.
#pragma once

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "guards/fault.hpp"
#include "llama/gguf_check.hpp"

#include "llama.h"

#include <stdexcept>
#include <string>

namespace triollama::native {

// `source` has gone through check_model. Throws native_abort where llama.cpp would have ended the process,
// runtime_error where it says that it failed, and where its file is none.
inline void guarded_quantize(const std::string & source, const std::string & target,
                             const llama_model_quantize_params & params) {
    uint32_t code;
    {
        AbortScope aborts;
        aborts.enter();
        FaultScope faults;
        faults.enter();
        code = llama_model_quantize(source.c_str(), target.c_str(), &params);
        if (faults.fault()) {
            throw format_error(faults.fault());
        }
    }
    if (code != 0) {
        throw std::runtime_error("it gave up");
    }
    try {
        check_gguf(target);     // it does not look whether a write went through
    } catch (const format_error & e) {
        throw std::runtime_error("what it wrote is damaged: " + std::string(e.what()));
    }
}

}  // namespace triollama::native

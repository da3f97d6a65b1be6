// As raise_native_error, and the training engine's own exception besides.
#pragma once

#include "guards/raise.hpp"
#include "training/graph.hpp"

namespace triollama::native {

inline void raise_trainer_error() {
    try {
        throw;
    } catch (const training_aborted & e) {
        raise_typed("DecodeAborted", e.what());
    } catch (...) {
        raise_native_error();
    }
}

}  // namespace triollama::native

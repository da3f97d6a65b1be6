// ggml has one lock for the process, which every graph takes for a moment. A child that was forked in such a moment would
// wait for it for ever, so who forks waits for the moment to pass.
#include "ggml-threading.h"

#if !defined(_WIN32)
#include <pthread.h>

static const int registered = pthread_atfork(ggml_critical_section_start, ggml_critical_section_end, ggml_critical_section_end);
#endif

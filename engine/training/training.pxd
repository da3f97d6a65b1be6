"""The native training engine, trainer.hpp."""
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.map cimport map
from libcpp.optional cimport optional
from libcpp.set cimport set as cpp_set
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector

cimport ggml
cimport profile
from model_files cimport ModelFiles

cdef extern from "training/raise.hpp" namespace "triollama::native" nogil:
    void raise_trainer_error() noexcept

cdef extern from "training/arch.hpp" namespace "triollama::native" nogil:
    cdef cppclass Architecture:
        const char * name
        const char * notes

    cdef cppclass ModelGraphInfo:
        const Architecture * arch
        int n_layer
        int n_embd
        int n_vocab
        int n_ctx_max

    const vector[Architecture] & trainable_architectures() except +raise_trainer_error

cdef extern from "llama/gguf_meta.hpp" namespace "triollama::native" nogil:
    cdef cppclass GgufTensor:
        string name
        string type
        vector[int64_t] shape
        uint64_t bytes

    cdef cppclass GgufMeta:
        GgufMeta(const string & path) except +raise_trainer_error
        optional[string] text(const string & key) except +raise_trainer_error
        optional[double] number(const string & key) except +raise_trainer_error
        optional[vector[double]] numbers(const string & key) except +raise_trainer_error
        vector[string] keys() except +raise_trainer_error
        vector[GgufTensor] tensors() except +raise_trainer_error

cdef extern from "ggml.h" nogil:
    ctypedef struct ggml_tensor:
        int64_t ne[4]

cdef extern from "training/adapter.hpp" namespace "triollama::native" nogil:
    cdef cppclass AdapterConfig:
        int rank
        float alpha
        cpp_bool rslora
        vector[string] targets
        uint64_t seed
        vector[int32_t] invocation

    cdef cppclass LoraPair:
        string name
        ggml_tensor * a
        ggml_tensor * b

    enum AdapterPart:
        PART_WEIGHTS
        PART_GRADIENTS
        PART_FIRST_MOMENTS
        PART_SECOND_MOMENTS

    cdef cppclass AdapterSet:
        const vector[LoraPair] & pairs()
        const AdapterConfig & config()
        size_t n_parameters()
        void get(AdapterPart part, float * out, size_t n) except +raise_trainer_error
        void set(AdapterPart part, const float * values, size_t n) except +raise_trainer_error
        double gradient_norm() except +raise_trainer_error
        void scale_gradients(float factor) except +raise_trainer_error
        void clear_gradients() except +raise_trainer_error

cdef extern from "training/product.hpp" namespace "triollama::native" nogil:
    enum class ProductKernel:
        portable
        ggml
        vector
        dots
        tiles

    cpp_bool has_product_kernel(ProductKernel kernel)
    const char * product_kernel_name(ProductKernel kernel)

cdef extern from "training/trainer.hpp" namespace "triollama::native" nogil:
    cdef cppclass TrainerConfig:
        string model_path
        AdapterConfig adapter
        float dropout
        cpp_bool exact
        int n_threads
        int n_gpu_layers
        size_t kept_bytes
        optional[ProductKernel] kernel

    cdef cppclass TrainingRow:
        vector[int32_t] tokens
        vector[int32_t] positions
        vector[int32_t] segments
        vector[int32_t] labels
        vector[float] weights

    cdef cppclass RowResult:
        double loss
        vector[float] nll
        vector[int32_t] predicted

    cdef cppclass AdamW:
        float learning_rate
        float beta1
        float beta2
        float epsilon
        float weight_decay

    cdef cppclass TrainerMemory:
        size_t weights
        size_t adapter
        size_t activations
        size_t arena

    cdef cppclass Audited "triollama::native::Executor::Audited":
        int64_t count
        cpp_bool supported
        cpp_bool contiguous

    cdef cppclass Trainer:
        Trainer(const TrainerConfig & config) except +raise_trainer_error
        RowResult forward_backward(const TrainingRow & row) except +raise_trainer_error
        RowResult evaluate(const TrainingRow & row) except +raise_trainer_error
        map[string, profile.Timing] profile(const TrainingRow & row) except +raise_trainer_error
        map[string, Audited] audit(
            int n_tokens, const cpp_set[string] & missing) except +raise_trainer_error
        void adamw_step(const AdamW & optimiser) except +raise_trainer_error
        ProductKernel kernel()
        AdapterSet & adapter()
        const ModelGraphInfo & model()
        const ModelFiles & model_files()
        void save_adapter(
            const string & path,
            const vector[pair[string, string]] & metadata) except +raise_trainer_error
        void load_adapter(const string & path) except +raise_trainer_error
        void save_merged(const string & path, ggml.ggml_type type) except +raise_trainer_error
        int64_t step()
        uint64_t dropout_counter()
        void restore_counters(int64_t step, uint64_t dropout_counter) except +raise_trainer_error
        void set_threads(int n_threads) except +raise_trainer_error
        void request_abort(cpp_bool abort)
        TrainerMemory memory()

# cmake -DNM=... -DFILE=... -P check_symbols.cmake: fails where a file calls a part of OpenMP that nothing linked has.
# GCC may compile a construct that is new in ggml to a call that threads/gomp.cpp lacks; then importing would fail.
execute_process(COMMAND "${NM}" -D "${FILE}" OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
if(NOT status EQUAL 0)
    message(FATAL_ERROR "${NM} could not read ${FILE}, to see what it calls: ${status}")
endif()
string(REGEX MATCHALL "U (GOMP|omp)_[A-Za-z0-9_]+" missing "${symbols}")
if(missing)
    string(REGEX REPLACE "U " "" missing "${missing}")
    list(JOIN missing ", " missing)
    file(REMOVE "${FILE}")
    message(FATAL_ERROR "ggml, as this compiler translates it, calls ${missing}, which engine/threads/gomp.cpp lacks. "
        "Build with the system's OpenMP: CMAKE_ARGS=-DTRIOLLAMA_TEAM=OFF")
endif()

// C++ exceptions that leave llama.cpp or our own native code become typed Python exceptions.
#pragma once

#include "guards/errors.hpp"

#include <Python.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace triollama::native {

inline void raise_typed(const char * class_name, const char * message) {
    PyObject * module = PyImport_ImportModule("triollama.errors");
    PyObject * cls    = module ? PyObject_GetAttrString(module, class_name) : nullptr;
    // A message may quote a file, whose bytes need not be UTF-8.
    PyObject * text = cls ? PyUnicode_DecodeUTF8(message, (Py_ssize_t) std::strlen(message), "replace") : nullptr;
    if (text) {
        PyErr_SetObject(cls, text);
    }
    Py_XDECREF(text);
    Py_XDECREF(cls);
    Py_XDECREF(module);
}

// An OSError of the class that fits its errno.
inline void raise_file_error(const file_error & e) {
    PyObject * path = PyUnicode_DecodeFSDefault(e.path.c_str());
    PyObject * args = path ? Py_BuildValue("(isO)", e.code, std::strerror(e.code), path) : nullptr;
    if (args) {
        PyErr_SetObject(PyExc_OSError, args);
    }
    Py_XDECREF(args);
    Py_XDECREF(path);
}

// The handler of every `except +raise_native_error` declaration. Called with the GIL, inside the catch block.
inline void raise_native_error() {
    try {
        throw;
    } catch (const grammar_error & e) {
        raise_typed("GrammarError", e.what());
    } catch (const state_error & e) {
        raise_typed("StateError", e.what());
    } catch (const format_error & e) {
        raise_typed("ModelFormatError", e.what());
    } catch (const model_changed & e) {
        raise_typed("ModelChangedError", e.what());
    } catch (const file_error & e) {
        raise_file_error(e);
    } catch (const unsupported_error & e) {
        raise_typed("UnsupportedError", e.what());
    } catch (const std::bad_alloc &) {
        raise_typed("OutOfMemoryError", "the native library could not allocate memory");
    } catch (const std::length_error & e) {
        raise_typed("OutOfMemoryError", e.what());
    } catch (const std::invalid_argument & e) {
        raise_typed("ParameterError", e.what());
    } catch (const std::out_of_range & e) {
        raise_typed("ParameterError", e.what());
    } catch (const std::exception & e) {
        raise_typed("EngineError", e.what());
    } catch (...) {
        raise_typed("EngineError", "the native library threw something that is no std::exception");
    }
}

}  // namespace triollama::native

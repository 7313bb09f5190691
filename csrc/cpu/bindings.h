// What the units of the module wrpo_kernels._cpu share: pointers as integers, and checks of what would corrupt memory.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;
using namespace py::literals;
using Pointer = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

inline void require(bool holds, const char* name, const char* expected, const std::string& got) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

inline void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (!holds) require(false, name, expected, std::to_string(got));
}

inline void require_present(std::initializer_list<std::pair<const char*, Pointer>> pointers) {
  for (const auto& [name, pointer] : pointers) require(pointer != 0, name, "a pointer", "0");
}

inline int usable_threads(int threads, int64_t pieces) {
  require(threads >= 1, "threads", "at least 1", threads);
  return int(threads < pieces ? threads : pieces);
}

void add_matrix_functions(py::module_& m);

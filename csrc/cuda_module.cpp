// The Python module star_kernels._C_cuda. Importing it loads the object, whose csrc/<family>/cuda*.cu register
// the CUDA forms of the operators that csrc/ops.cpp declares.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>

static torch::stable::Tensor empty_operator(torch::stable::Tensor x) { return x; }

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CUDA, m) { m.impl("_empty", TORCH_BOX(&empty_operator)); }

static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr, nullptr, nullptr,
                                        nullptr, nullptr};

// The module's two members say what it was built with, for the check of the driver before its use.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  PyObject* module = PyModule_Create(&module_definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddIntConstant(module, "cuda_version", STAR_CUDA_VERSION) != 0 ||       // 13000: CUDA 13.0
      PyModule_AddStringConstant(module, "architectures", STAR_CUDA_ARCHS) != 0) {     // "80;90a;100+PTX;120"
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

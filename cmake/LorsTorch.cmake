# torch_stable: torch's headers and libtorch.so for the LibTorch stable ABI, torch >= 2.10.
# find_package(Torch) is not used: it drags in the CUDA toolkit torch was built with, and none of it is needed.
if(NOT LORS_TORCH_DIR)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  # Located, not imported: importing torch takes seconds and is no business of a build. Also where this Python installs
  # packages, which pip hides from an isolated build: with the stable ABI the headers of any torch will do.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.machinery as m, site, sys; \
s = m.PathFinder.find_spec('torch', [*sys.path, *site.getsitepackages(), site.getusersitepackages()]); \
print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE LORS_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${LORS_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "torch >= 2.10 was not found by ${Python_EXECUTABLE}. Install it first (pip install torch), or say where an "
    "installed one is, as an isolated build needs that is not pip's: -Ccmake.define.LORS_TORCH_DIR=PATH/TO/torch.")
endif()
message(STATUS "lors_cuda: torch headers from ${LORS_TORCH_DIR}")

add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES
  IMPORTED_LOCATION "${LORS_TORCH_DIR}/lib/libtorch.so"
  # Also makes torch's headers SYSTEM: their warnings are not ours.
  INTERFACE_INCLUDE_DIRECTORIES "${LORS_TORCH_DIR}/include"
  # libtorch.so is an umbrella without symbols of its own: keep it as needed, and resolve through it at load time.
  INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed;LINKER:--allow-shlib-undefined")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY)

# Decides LORS_CUDA_ENABLED from LORS_CUDA and the machine, and enables the CUDA language.
set(LORS_CUDA_ENABLED OFF)
set(LORS_CUDA_VERSION "")
set(LORS_CUDA_ARCHS_TEXT "")
if(NOT LORS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LORS_CUDA is '${LORS_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(NOT LORS_CUDA STREQUAL "OFF")
  # In one order, each once: what the build says of itself does not depend on how the list was written.
  list(REMOVE_DUPLICATES LORS_CUDA_ARCHS)
  list(SORT LORS_CUDA_ARCHS COMPARE NATURAL)
  foreach(arch IN LISTS LORS_CUDA_ARCHS)
    if(NOT arch MATCHES "^[1-9][0-9]+[af]?$")
      message(FATAL_ERROR
        "LORS_CUDA_ARCHS holds '${arch}'; it must be a list of architectures as nvcc numbers them, e.g. 80;90a "
        "(compute capability 9.0 with its own instructions is 90a).")
    endif()
  endforeach()
  if(NOT LORS_CUDA_ARCHS)
    message(FATAL_ERROR "LORS_CUDA_ARCHS is empty; name the architectures to build for, e.g. 80;90a, or set LORS_CUDA=OFF.")
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(LORS_CUDA_ENABLED ON)
  elseif(LORS_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "LORS_CUDA=ON, but no nvcc was found. Install the CUDA toolkit, set CUDACXX to its nvcc, or build the CPU backend "
      "alone with LORS_CUDA=OFF.")
  endif()
endif()
if(LORS_CUDA_ENABLED)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # the list is ours, see lors_cuda_target
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(LORS_CUDA_VERSION "${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}")
  string(REPLACE ";" "," LORS_CUDA_ARCHS_TEXT "${LORS_CUDA_ARCHS}")
endif()
message(STATUS "lors_cuda: CUDA backend ${LORS_CUDA_ENABLED} (nvcc ${LORS_CUDA_VERSION}, architectures ${LORS_CUDA_ARCHS_TEXT})")

# lors_cuda_target(target): nvcc's settings for a target with .cu files.
function(lors_cuda_target target)
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  foreach(arch IN LISTS LORS_CUDA_ARCHS)
    # Spelled out: `-arch=sm_90a` would also emit compute_90, which rejects that architecture's own instructions.
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_${arch},code=sm_${arch}>")
  endforeach()
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xptxas=-warn-spills,-Werror --compress-mode=size>"
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcompiler -Wall,-Wextra,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>")
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()

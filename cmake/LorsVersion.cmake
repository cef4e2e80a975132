# LORS_WHEEL_LABEL, what a wheel of this build is labelled: cpu, or the CUDA major and every architecture, e.g.
# cu13.sm80.sm90a. LORS_VERSION, what the build calls itself: the plain version, or with that label and no other.
set(LORS_WHEEL_LABEL cpu)
if(LORS_CUDA_ENABLED)
  list(TRANSFORM LORS_CUDA_ARCHS PREPEND "sm" OUTPUT_VARIABLE LORS_WHEEL_LABEL)
  list(JOIN LORS_WHEEL_LABEL "." LORS_WHEEL_LABEL)
  string(PREPEND LORS_WHEEL_LABEL "cu${CUDAToolkit_VERSION_MAJOR}.")
endif()
set(LORS_LABELLED_VERSION "${PROJECT_VERSION}+${LORS_WHEEL_LABEL}")
# `make wheel` configures a tree to learn it, and hands it to the build backend (pyproject.toml).
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/generated/wheel_version" "${LORS_LABELLED_VERSION}\n")

set(LORS_VERSION "${PROJECT_VERSION}")
if(SKBUILD_PROJECT_VERSION_FULL)  # the version in the metadata of the distribution that is being built
  set(LORS_VERSION "${SKBUILD_PROJECT_VERSION_FULL}")
endif()
if(NOT LORS_VERSION STREQUAL PROJECT_VERSION AND NOT LORS_VERSION STREQUAL LORS_LABELLED_VERSION)
  message(FATAL_ERROR
    "The wheel would be called ${LORS_VERSION}, but this build is ${LORS_LABELLED_VERSION}: its label must name the CUDA "
    "major and the architectures it is built for. Build it with `make wheel CUDA_ARCHS=...`, which derives the label, or "
    "without LORS_WHEEL_LABEL for the plain version.")
endif()

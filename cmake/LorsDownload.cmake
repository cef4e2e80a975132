# lors_find(package url sha256 debian): the installed package; else its source, downloaded and built in the build folder.
function(lors_find package url sha256 debian)
  find_package(${package} QUIET)
  if(${package}_FOUND)
    return()
  endif()
  # Downloaded here and not by FetchContent, whose errors fill a screen.
  set(archive "${CMAKE_BINARY_DIR}/${package}.tar.gz")
  set(status "an earlier download was damaged")
  if(NOT EXISTS "${archive}")
    file(DOWNLOAD "${url}" "${archive}" STATUS status)
  endif()
  file(SHA256 "${archive}" downloaded)
  if(NOT downloaded STREQUAL sha256)
    file(REMOVE "${archive}")
    message(FATAL_ERROR
      "${package} is not installed, and ${url} did not come as expected (${status}): install it (Debian, Ubuntu: "
      "apt-get install ${debian}) or connect this machine, and run the same command again.")
  endif()
  include(FetchContent)
  FetchContent_Declare(${package} URL "${archive}" URL_HASH "SHA256=${sha256}" DOWNLOAD_EXTRACT_TIMESTAMP ON SYSTEM)
  FetchContent_MakeAvailable(${package})
endfunction()

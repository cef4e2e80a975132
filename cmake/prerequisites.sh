#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What `make` needs and pip cannot install.
#   prerequisites.sh PYTHON               a Python and a C++ compiler that will do, or one sentence and exit code 1
#   prerequisites.sh PACKAGE HEADER       as root on Debian or Ubuntu: the package, unless the header is there already; without
#                                         it CMake downloads the source (cmake/LorsDownload.cmake)
set -euo pipefail

compiler=$(command -v "${CXX:-c++}" g++ clang++ | head -n 1) || true
if [ $# = 2 ]; then
  if ! "$compiler" -x c++ -E -include "$2" /dev/null >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing $1 with apt-get."
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1"; } >/dev/null || true
  fi
  exit
fi
code='import ensurepip, os, sys, sysconfig
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))
sys.exit(sys.version_info < (3, 10))'
if ! "$1" -c "$code" >/dev/null 2>&1; then
  echo "$1 is not a Python >= 3.10 with venv and C headers: install those (Debian, Ubuntu: apt-get install python3-venv" \
    "python3-dev), or name another Python, as in: make PYTHON=python3.12" >&2
  exit 1
fi
if [ -z "$compiler" ]; then
  echo "There is no C++ compiler${CXX:+ $CXX}: install one that has C++20 (Debian, Ubuntu: apt-get install g++), or set CXX." >&2
  exit 1
fi

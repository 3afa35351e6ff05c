#!/usr/bin/env bash
# The native code under AddressSanitizer and UBSan: a build of its own in build/sanitize, and the tests that reach deep
# into it. Fails where a test fails or a sanitizer says anything.
#
# PYTHON: with what the tests and a build need, .venv-test's where it is not set. CXX: g++, the C++ compiler where it is
# not set. Arguments go to pytest instead of the tests below.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$("${PYTHON:-.venv-test/bin/python}" -c "import sys; print(sys.executable)")
CXX=${CXX:-c++}
build=$PWD/build/sanitize
tests=(tests/native tests/models/test_mutations.py tests/engine/test_families.py tests/engine/test_same_bits.py)
[ $# -eq 0 ] || tests=("$@")

fail() {
  echo "sanitize: $1" >&2
  exit 1
}

# The runtime comes before everything else of the process, and libstdc++ before it looks for what throws.
preload=
for library in libasan.so libstdc++.so.6; do
  file=$("$CXX" -print-file-name="$library")
  [ -f "$file" ] || fail "$CXX has no $library: name a GCC that has, with CXX=g++."
  preload+=" $file"
done

flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
cmake -S native -B "$build" -G Ninja --log-level=NOTICE -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER="$CXX" \
  -DCMAKE_CXX_FLAGS_DEBUG="$flags" -DPython_EXECUTABLE="$python"
cmake --build "$build"

# An editable install finds its modules before PYTHONPATH is looked at; this comes before it.
mkdir -p "$build/python"
cat >"$build/python/sitecustomize.py" <<'PYTHON'
"""`fallow._native` is the module beside this folder, in every process."""

import glob
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_file_location


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "fallow._native":
            return None
        (module,) = glob.glob(os.path.join(os.path.dirname(__file__), "..", "_native.*"))
        return spec_from_file_location(name, os.path.realpath(module))


sys.meta_path.insert(0, Finder())
PYTHON

# Python keeps some memory to its end. A damaged file may ask for any size, which must be an exception as it is without a
# sanitizer. Where uses of a stack after a return are looked for, GCC 12 stores vectors of 64 bytes at odd multiples of 32,
# which crashes.
sanitized() {
  PYTHONPATH="$build/python:$PWD/src${PYTHONPATH:+:$PYTHONPATH}" LD_PRELOAD="$preload" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0 \
    UBSAN_OPTIONS=print_stacktrace=1 "$python" "$@"
}

sanitized - "$build" <<'PYTHON' || fail "the tests would not import the module of $build."
import pathlib, sys
from fallow import _native

file = pathlib.Path(_native.__file__)
print(f"sanitize: {file}")
assert file.parent == pathlib.Path(sys.argv[1]).resolve(), file
assert all(name in file.read_bytes() for name in (b"__asan_report_load", b"__ubsan_handle")), "it is not sanitized"
PYTHON

# Reports go past pytest, which would take them along when the process ends (sys), and Python's own handler of signals
# would hide where a crash came from.
sanitized -m pytest -ra -m '' --capture=sys -p no:faulthandler -p no:cacheprovider --durations=5 "${tests[@]}" 2>&1 |
  tee "$build/log"
! grep -qE 'ERROR: AddressSanitizer|runtime error: ' "$build/log" || fail "a report is above."

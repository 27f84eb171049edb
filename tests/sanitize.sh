#!/bin/sh
# The native operator under AddressSanitizer and UndefinedBehaviorSanitizer, and the kernels for GPUs, on a CPU.
#
#     sh tests/sanitize.sh                      # the small cases of tests/test_native.py
#     sh tests/sanitize.sh 'row or stride'      # those with these words
#     sh tests/sanitize.sh hostile              # 400 cases of tests/hostile.py
#     sh tests/sanitize.sh hostile --seed 3     # with its arguments
#     sh tests/sanitize.sh gpu thread           # tests/test_cuda.py, at 40 drawn sizes, under ThreadSanitizer
#     sh tests/sanitize.sh gpu address          # under AddressSanitizer
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ "${1:-}" = gpu ]; then
    RIM_RNN_SANITIZER=$2 RIM_RNN_GPU_CASES=40 exec "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k equals
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r src/rim_rnn "$work"
rm -f "$work"/rim_rnn/_native.*
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
${CXX:-g++} -shared -fPIC -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$torch/include" "$work"/rim_rnn/csrc/*.cpp \
    -L"$torch/lib" -ltorch_cpu -o "$work/rim_rnn/_native.so"
if [ "${1:-}" = hostile ]; then
    shift
    set -- tests/hostile.py --cases 400 "$@"
else
    set -- -m pytest -q -p no:cacheprovider tests/test_native.py \
        -k "${1:-equals or few or float32 or threads or twice or row or stride or checked}"
fi
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 RIM_RNN_NATIVE=1 PYTHONPATH="$work" "$python" "$@"

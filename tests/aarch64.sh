#!/bin/sh
# Tests against the aarch64 wheel in dist/ (make wheels), emulated: on Debian with qemu-user-static, after `dpkg --add-architecture arm64`
# and `apt-get update`. Python is Debian's; torch, the oldest that is supported, and the rest come from the package index.
#
#     sh tests/aarch64.sh                       # tests/test_native.py, some ninety minutes
#     sh tests/aarch64.sh -k 'few or stride'    # with pytest's arguments
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/packages" "$work/system"
needed=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
    python3:arm64 libstdc++6:arm64 libgomp1:arm64 | grep '^[a-z].*:arm64$' | sort -u)
(cd "$work/packages" && apt-get download -qq $needed && for package in *.deb; do dpkg-deb -x "$package" "$work/system"; done)
python=$(ls "$work"/system/usr/bin/python3.*[0-9])
python -m pip install --quiet --no-deps --only-binary :all: --target "$work/site" --python-version "${python##*/python}" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    torch==2.10.0 filelock fsspec jinja2 markupsafe mpmath networkx sympy typing_extensions \
    numpy pytest hypothesis iniconfig packaging pluggy pygments sortedcontainers dist/*aarch64.whl
cp -r tests pyproject.toml "$work" # away from src
cd "$work"
export QEMU_CPU=cortex-a76 QEMU_LD_PREFIX="$work/system" PYTHONPATH="$work/site" RIM_RNN_NATIVE=1
emulated="qemu-aarch64-static $python"
$emulated -m rim_rnn
[ $# -gt 0 ] || set -- -v
$emulated -m pytest -p no:cacheprovider tests/test_native.py "$@"

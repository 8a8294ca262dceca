#!/bin/bash
# The compiled operators under the address, undefined-behaviour and thread sanitizers, and for 64-bit ARM under emulation.
# Needs g++; for ARM aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user), else that part is
# skipped, or an error where REQUIRE_ARM=1.
set -eu -o pipefail
cd "$(dirname "$0")/.."
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
flags="-std=c++17 -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Werror"
build() {  # compiler, output, flags
    local compiler=$1 target=$2; shift 2
    "$compiler" $flags "$@" *.cpp check/check.cpp -o "$target" -pthread
}
run() {  # name, command; 77: this processor lacks the instruction set
    local status=0
    "${@:2}" || status=$?
    if [ $status -ne 0 ] && [ $status -ne 77 ]; then echo "$1 failed with $status" >&2; exit 1; fi
}
build g++ "$out/address" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all &
build g++ "$out/thread" -O1 -g -fsanitize=thread &
wait
for isa in baseline avx2 avx512; do run "address sanitizer, $isa" "$out/address" $isa; done
run "thread sanitizer" "$out/thread" baseline
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
    build aarch64-linux-gnu-g++ "$out/arm" -O2 -static
    echo -n "64-bit ARM, "; run "64-bit ARM" qemu-aarch64 "$out/arm" baseline
elif [ "${REQUIRE_ARM:-0}" = 1 ]; then
    echo "error: no aarch64-linux-gnu-g++ or no qemu-aarch64. Fix: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1
else
    echo "64-bit ARM: skipped, no cross compiler or emulator"
fi

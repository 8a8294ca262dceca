#!/bin/bash
# The compiled operators under the address, undefined-behaviour and thread sanitizers, and for 64-bit ARM under emulation.
# Needs g++; for ARM aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user), else that part is
# skipped, or an error where REQUIRE_ARM=1.
set -eu -o pipefail
cd "$(dirname "$0")/.."
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
# Teams have more threads than cores here, and spinning takes the time of the thread that is waited for.
flags="-std=c++17 -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Werror -DSPINS=20"
objects() {  # compiler, folder, sources, flags
    local compiler=$1 folder=$2 sources=$3 source; shift 3
    mkdir -p "$out/$folder"
    for source in $sources; do "$compiler" $flags "$@" -c $source -o "$out/$folder/$(basename $source .cpp).o"; done
}
run() {  # name, command; 77: this processor lacks the instruction set
    local status=0
    "${@:2}" | tee -a "$out/said" || status=$?
    if [ $status -ne 0 ] && [ $status -ne 77 ]; then echo "$1 failed with $status" >&2; exit 1; fi
}
# The checks themselves are compiled once, without a sanitizer: it watches what the operators do, and with whose memory.
address="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" thread="-O1 -g -fsanitize=thread"
objects g++ checks "check/*.cpp" -O1
objects g++ address "*.cpp" $address &
first=$!
objects g++ thread "*.cpp" $thread
wait $first
for each in address thread; do g++ ${!each} "$out/$each"/*.o "$out"/checks/*.o -o "$out/$each/check" -pthread; done
for isa in baseline avx2 avx512 avx512vnni; do run "address sanitizer, $isa" "$out/address/check" $isa; done
run "thread sanitizer" "$out/thread/check" baseline
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
    objects aarch64-linux-gnu-g++ arm "*.cpp" -O3
    objects aarch64-linux-gnu-g++ arm "check/*.cpp" -O1
    aarch64-linux-gnu-g++ -static "$out"/arm/*.o -o "$out/arm/check" -pthread
    echo -n "64-bit ARM, "; run "64-bit ARM" qemu-aarch64 "$out/arm/check" baseline
elif [ "${REQUIRE_ARM:-0}" = 1 ]; then
    echo "error: no aarch64-linux-gnu-g++ or no qemu-aarch64. Fix: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1
else
    echo "64-bit ARM: skipped, no cross compiler or emulator"
fi
if [ "$(grep -o "selections [0-9a-f]*" "$out/said" | sort -u | wc -l)" != 1 ]; then
    echo "instruction sets differ in what N:M pruning selects" >&2; exit 1
fi

# Cross-compiler for arm64: the clang of the `ziglang` wheel, programs linked statically (musl, libc++), so that qemu
# needs no system of the other machine. -DZIG=path of the wheel's `zig`.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG)
set(CMAKE_CXX_COMPILER "${ZIG};c++;-target;aarch64-linux-musl")
set(CMAKE_CXX_ARCHIVE_CREATE "\"${ZIG}\" ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "\"${ZIG}\" ranlib <TARGET>")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)

// Instruction sets of the AMX kernels. Include after every header that defines functions: what
// follows is compiled for them, and an inline function compiled here must not replace the plain
// copy that another file links. Clang has no such pragma: give it the same names as -m flags.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,popcnt")
#define PERMLLM_TARGET_BF16  // of which GCC's pragma defines no macro in C++
#endif

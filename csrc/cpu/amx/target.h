// Instruction sets of the AMX kernels, for compilers that were given none: what follows is compiled
// for them. Include after every header that defines functions, since an inline function compiled
// here must not replace the plain copy that another file links. setup.py gives -m flags, as Clang,
// which has no such pragma, asks for; there the order of linking keeps the plain copies.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && !defined(PERMLLM_EMULATED)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,popcnt")
#define PERMLLM_TARGET_BF16  // of which GCC's pragma defines no macro in C++
#endif

// Compiles a function for several x86 generations; the loader picks one at run time.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTUNET_VECTORIZED __attribute__((target_clones("avx2", "default")))
#if __GNUC__ >= 12
// with AVX-512, and with fused multiply-adds where a file allows them
#define FASTUNET_VECTORIZED_WIDE \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTUNET_VECTORIZED_WIDE FASTUNET_VECTORIZED
#endif
#else
#define FASTUNET_VECTORIZED
#define FASTUNET_VECTORIZED_WIDE
#endif

#if defined(__GNUC__)
// a helper that is not inlined would be compiled for the oldest generation
#define FASTUNET_INLINED __attribute__((always_inline))
#else
#define FASTUNET_INLINED
#endif
#define FASTUNET_INLINE inline FASTUNET_INLINED

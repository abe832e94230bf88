// Compiles a function for several x86 generations; the loader picks one at run time.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTUNET_VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define FASTUNET_VECTORIZED
#endif

#if defined(__GNUC__)
// a helper that is not inlined would be compiled for the oldest generation
#define FASTUNET_INLINE inline __attribute__((always_inline))
#else
#define FASTUNET_INLINE inline
#endif

"""The benchmarks: installed as ``fastunet_benchmarks``, run by ``fastunet bench``."""

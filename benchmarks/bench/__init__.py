"""Parts of benchmarks."""

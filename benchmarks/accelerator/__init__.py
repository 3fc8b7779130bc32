"""The parts of `benchmarks/gpu.py`: what is built, what is run, how it is timed, and where each row is written."""

"""The compiled parts of the package: plain Extensions, so that the source distribution keeps each .pyx."""

import os

from setuptools import Extension, setup


# Not all Pythons were built to optimise as far as loops become instructions for many numbers; Windows' compiler does.
LOOPS = [] if os.name == "nt" else ["-O3"]
setup(
    ext_modules=[
        Extension("hf_sparse_cache._planner", ["_planner.pyx"]),
        Extension("hf_sparse_cache._codec", ["_codec.pyx"], extra_compile_args=LOOPS),
    ]
)

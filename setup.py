"""The one compiled part of the package: a plain Extension, so that the source distribution keeps the .pyx."""

from setuptools import Extension, setup


setup(ext_modules=[Extension("hf_sparse_cache._planner", ["_planner.pyx"])])

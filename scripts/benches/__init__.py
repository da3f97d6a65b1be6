"""What scripts/bench.py can measure: one module for each section.

A section is a module here with a function ``figures(options: Options) -> Iterator[Figure]``. It
yields each figure as soon as it has been measured. Its docstring's first line describes it.
"""

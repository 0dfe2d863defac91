"""Kernels for the processor, written in Python and compiled when a model is loaded.

``language.py`` has the words they are written in, ``compiler.py`` turns them into machine code and runs them on torch's
own threads. Everything here has an equal in plain torch that it is tested against, and that stands in where it cannot
be compiled.
"""

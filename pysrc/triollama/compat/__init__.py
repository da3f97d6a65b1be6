"""The names of other libraries, for programs that come from there: ``compat.swift``."""

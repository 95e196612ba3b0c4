"""The version of the package, read by the build and by what is written into files."""

__version__ = "0.1.0"

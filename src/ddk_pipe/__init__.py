"""ddk-pipe: pay for the teacher once, distil any number of students from its cached predictions."""

from importlib.metadata import version

__version__ = version("ddk-pipe")

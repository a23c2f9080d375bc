"""The import path that 2.1 gave the V1 class."""

from ..buffer import Buffer

__all__ = ["Buffer"]

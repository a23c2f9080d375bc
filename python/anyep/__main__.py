"""``python -m anyep``: the command line tool, with the same arguments as ``anyep``."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Becomes the tool that was installed with the package."""
    tool = Path(__file__).absolute().parent / "bin" / "anyep"
    if not tool.exists():
        sys.exit("anyep: this installation has no command line tool (it was built without CLI11 or nlohmann-json)")
    os.execv(str(tool), ["anyep", *sys.argv[1:]])


if __name__ == "__main__":
    main()

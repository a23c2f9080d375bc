"""Where 2.1 keeps its classes; ours has the V1 class, in ``legacy``."""

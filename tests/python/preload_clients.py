"""Imported once by the server that forks ranks (ranks.run_gloo): clients that are slow to import."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import megatron.core.transformer.moe.fused_a2a  # noqa: F401
    except ImportError:
        pass  # its test says so

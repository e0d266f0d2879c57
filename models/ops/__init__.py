"""Operators that PyTorch does not have: the WKV average of RWKV-4."""

from models.ops.wkv import live_backend, wkv

__all__ = ["live_backend", "wkv"]

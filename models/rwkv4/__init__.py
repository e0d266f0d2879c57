"""RWKV-4."""

from models.families import Family
from models.rwkv4.formats import FORMATS
from models.rwkv4.model import RWKV4

FAMILY = Family(
    name="rwkv4",
    label="RWKV-4",
    model=RWKV4,
    toy=lambda: RWKV4(64, n_layer=2, n_embd=32, ctx_len=32),
    formats=FORMATS,
)

"""GPT-NeoX, which Pythia is."""

from models.families import Family
from models.gpt.formats import FORMATS
from models.gpt.model import GPT

FAMILY = Family(
    name="gpt",
    label="GPT",
    model=GPT,
    toy=lambda: GPT(64, n_layer=2, n_embd=32, n_head=2, ctx_len=32),
    formats=FORMATS,
)

"""A family that exists only in the tests: a folder and a yaml, and every command takes it."""

from models.toy.model import Toy

from models.families import Family

FAMILY = Family(
    name="toy", label="Toy", model=Toy, toy=lambda: Toy(64, n_layer=1, n_embd=8, ctx_len=32)
)

"""Families of models in a report: their labels, and a colour and a marker for each."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.colors import to_rgb

# Okabe and Ito's colours, told apart with any colour vision; markers tell families apart in print
PALETTE = (
    ("#D55E00", "s"), ("#0072B2", "o"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#222222", "X"),
)  # fmt: skip


@dataclass(frozen=True)
class Families:
    """The families of a study.

    Attributes:
        reference: the family that all others are compared with.
        labels: what readers call each family that is there.
    """

    reference: str
    labels: dict[str, str]

    @classmethod
    def of(cls, runs: pd.DataFrame, reference: str) -> "Families":
        """The families of some runs, with the labels of their manifests or else their names."""
        labels = runs["family_label"].fillna(runs["family"])
        return cls(reference, dict(zip(runs["family"], labels, strict=True)))

    @property
    def reference_label(self) -> str:
        """What readers call the reference."""
        return self.label(self.reference)

    def label(self, family: str) -> str:
        """What readers call a family."""
        return self.labels.get(family, family)

    def names(self, runs: pd.DataFrame) -> str:
        """The labels of the families of some runs, as a title lists them."""
        *names, last = [self.label(family) for family in runs["family"].unique()]
        return f"{', '.join(names)} and {last}" if names else last

    def color(self, family: str) -> str:
        """The first colour for the reference, the others by their names, the last name first."""
        return self._style(family)[0]

    def marker(self, family: str) -> str:
        """The marker that goes with the colour."""
        return self._style(family)[1]

    def dashes(self, family: str) -> str | tuple[int, tuple[float, ...]]:
        """Lines of the reference are dashed."""
        return (0, (5, 1.5)) if family == self.reference else "-"

    def shade(self, runs: pd.DataFrame, family: str, model: str) -> tuple[float, float, float]:
        """A model's colour: its family's, lighter the smaller it is among the family's models."""
        of_family = runs[runs["family"] == family].drop_duplicates("model")
        models = list(of_family.sort_values("parameters/total")["model"])
        n, rank = len(models), models.index(model)
        weight = 1.0 if n == 1 else 0.35 + 0.65 * rank / (n - 1)
        red, green, blue = (1 - weight * (1 - c) for c in to_rgb(self.color(family)))
        return red, green, blue

    def _style(self, family: str) -> tuple[str, str]:
        others = sorted(set(self.labels) - {self.reference}, reverse=True)
        return PALETTE[[self.reference, *others].index(family) % len(PALETTE)]

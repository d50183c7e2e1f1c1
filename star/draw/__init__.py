"""Drawing genomes: in the terminal, and as SVG or PNG pictures.

Both show one line a LIV, coloured by family, with sharing as arcs in the margins: on the left LIVs that use
the same featurizer weights, on the right LIVs that use the same features, from the one that computes them to
those that reuse them. Both are drawn from the plans of `star.sharing`: what has no effect is not shown.
"""

from star.draw.arcs import FAMILY_COLOURS, family_colour
from star.draw.console import terminal
from star.draw.picture import figure, save
from star.draw.table import pools_table

__all__ = ["FAMILY_COLOURS", "family_colour", "figure", "pools_table", "save", "terminal"]

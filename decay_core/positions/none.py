"""No position encoding: the decay alone tells near from far.

Source: the paper's vector and scalar rows have none.
"""

from decay_core.position import Position


class NoPosition(Position):
    """Leaves queries and keys as they are."""

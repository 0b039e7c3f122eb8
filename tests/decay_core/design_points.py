"""Every valid and every invalid design point, for tests that go over all of them."""

import itertools

from decay_core import decays, positions
from decay_core.decay import DecayPlace
from decay_core.design import FORMS, GRANULARITIES, DesignPoint, Refusal


def every_point():
    for name, granularity, share, position, form in itertools.product(
        decays.names(), GRANULARITIES, (False, True), positions.names(), FORMS
    ):
        p = 0.9 if decays.get(name).takes_p else None
        yield DesignPoint(decay=name, p=p, granularity=granularity, share=share, position=position, form=form)


def is_valid(point):
    try:
        point.check()
    except Refusal:
        return False
    return True


VALID = [point for point in every_point() if is_valid(point)]
INVALID = [point for point in every_point() if not is_valid(point)]


def place(point, layer=0, layers=3, heads=2, head_dim=4):
    return DecayPlace(point=point, layer=layer, layers=layers, heads=heads, head_dim=head_dim)

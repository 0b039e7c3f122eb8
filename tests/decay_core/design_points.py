"""Every valid and every invalid design point, and a sample of the valid ones to build models of."""

import itertools

from decay_core import decays, positions, transitions
from decay_core.decay import DecayPlace
from decay_core.design import FORMS, GRANULARITIES, DesignPoint, Refusal

# What differs in how a decay meets an encoding or a transition: memory over time, a joint module, constants, none at all.
SAMPLE = ("lightnet", "hgrn2", "tnl", "none")


def every_point():
    for name, granularity, share, position, transition, form in itertools.product(
        decays.names(), GRANULARITIES, (False, True), positions.names(), transitions.names(), FORMS
    ):
        p = 0.9 if decays.get(name).takes_p else None
        yield DesignPoint(
            decay=name, p=p, granularity=granularity, share=share, position=position, transition=transition, form=form
        )


def is_valid(point):
    try:
        point.check()
    except Refusal:
        return False
    return True


VALID = [point for point in every_point() if is_valid(point)]
INVALID = sorted(set(every_point()) - set(VALID), key=repr)


def place(point, layer=0, layers=3, heads=2, head_dim=4, layer_shift=0):
    return DecayPlace(point=point, layer=layer, layers=layers, heads=heads, head_dim=head_dim, layer_shift=layer_shift)


def _built(point):
    if point.decay == "tnl" and point.position == "tpe" and point.form == "as_run":
        return False  # refused in models of few layers
    if point.transition == "diagonal" and point.position in ("none", "rope"):
        return True
    return point.decay in SAMPLE and (point.position != "rope_half" or point.granularity == "scalar")


MODELS = [point for point in VALID if _built(point)]
